//! Both ends of the channel over memory on the heap: honest, and with a peer that writes what it likes.

use api_channel::bulk;
use api_channel::call::{Call, DirtyFetch, HostInfo, LateRun, Memslot, PciDevice, PostedRange, VCPU_ALL};
use api_channel::event::Event;
use api_channel::lines::{host, soc};
use api_channel::message::MOST_PAYLOAD;
use api_channel::{ChannelError, Client, ClientWindows, Incoming, Server, ServerWindows, Status};
use ioreq_ring::BusMemory;
use proptest::prelude::*;
use wire_kit::Heap;

const EPOCH: u64 = 0x1122_3344_5566_7788;

/// All memory of a channel.
#[derive(Clone)]
struct Memory {
    host_lines: Heap,
    replies: Heap,
    events: Heap,
    soc_lines: Heap,
    requests: Heap,
    bulk: Heap,
}

impl Memory {
    fn new() -> Self {
        Self {
            host_lines: Heap::new(1024),
            replies: Heap::new(64 << 10),
            events: Heap::new(4096),
            soc_lines: Heap::new(1024),
            requests: Heap::new(64 << 10),
            bulk: Heap::new(8192),
        }
    }

    fn ends(&self) -> (Client<Heap, Heap>, Server<Heap, Heap>) {
        let Self { host_lines, replies, events, soc_lines, requests, bulk } = self.clone();
        let server = ServerWindows { host_lines, replies, events, soc_lines, requests, bulk };
        let Self { host_lines, replies, events, soc_lines, requests, bulk } = self.clone();
        let client = ClientWindows { host_lines, replies, events, soc_lines, requests, bulk };
        (Client::new(client, EPOCH), Server::new(server, EPOCH))
    }

    fn host_side(&self) -> [&Heap; 3] {
        [&self.host_lines, &self.replies, &self.events]
    }

    fn soc_side(&self) -> [&Heap; 2] {
        [&self.soc_lines, &self.requests]
    }
}

#[test]
fn a_request_is_answered_with_payload_and_bulk_and_the_bulk_is_held_until_it_is_fetched() {
    let memory = Memory::new();
    let (mut client, mut server) = memory.ends();
    let first = client.send(&Call::Statistics, 7).unwrap();
    let second = client.send(&Call::Ping, 0).unwrap();
    let (asked, call) = server.poll().unwrap().unwrap();
    assert_eq!((call, asked.deadline_ms), (Call::Statistics, 7));
    server.reply(asked, b"payload", &[7; 5000]).unwrap();
    assert_eq!(server.poll().unwrap().map(|(_, call)| call), None, "taken before the bulk was fetched");
    let reply = client.poll().unwrap().unwrap();
    let want =
        Incoming::Reply { sequence: first, status: Status::OK, payload: b"payload".to_vec(), bulk: vec![7; 5000] };
    assert_eq!(reply, want);
    let (asked, call) = server.poll().unwrap().unwrap();
    assert_eq!(call, Call::Ping);
    server.refuse(asked, Status::STATE, "not now").unwrap();
    let want = Incoming::Reply { sequence: second, status: Status::STATE, payload: b"not now".to_vec(), bulk: vec![] };
    assert_eq!(client.poll().unwrap(), Some(want));
    assert_eq!(client.poll().unwrap(), None);
}

#[test]
fn an_order_is_not_answered_and_an_unknown_call_is_by_name() {
    let memory = Memory::new();
    let (mut client, mut server) = memory.ends();
    client.order(&Call::Lines(vec![1, 2])).unwrap();
    let (asked, call) = server.poll().unwrap().unwrap();
    assert_eq!(call, Call::Lines(vec![1, 2]));
    server.reply(asked, b"nobody waits", &[]).unwrap();
    assert_eq!(client.poll().unwrap(), None);

    let sequence = client.send(&Call::Ping, 0).unwrap();
    // The request's first slot, its opcode changed to one that no version has.
    let slot = memory.soc_lines.load(soc::REQUESTS_TAIL) as usize - 1;
    let word = memory.requests.load(slot * 64);
    memory.requests.store(slot * 64, word & !0xffff | 0x7fff);
    assert_eq!(server.poll().unwrap().map(|(_, call)| call), None);
    // It can't be a reply to Ping: the client refuses it as nobody's.
    assert_eq!(client.poll(), Err(ChannelError::Class(0x7fff)), "{sequence}");
}

#[test]
fn rings_wrap_and_a_full_ring_refuses_without_losing_anything() {
    let memory = Memory::new();
    let (mut client, mut server) = memory.ends();
    let long = Call::SetState { target: 0, records: (0..9000u32).flat_map(u32::to_le_bytes).take(30_000).collect() };
    for _ in 0..20 {
        let sequence = client.send(&long, 0).unwrap();
        let (asked, call) = server.poll().unwrap().unwrap();
        assert_eq!(call, long);
        server.reply(asked, &vec![9; 20_000], &[]).unwrap();
        let Some(Incoming::Reply { sequence: got, payload, .. }) = client.poll().unwrap() else { panic!("no reply") };
        assert_eq!((got, payload), (sequence, vec![9; 20_000]));
    }
    let mut sent = 0;
    while client.send(&long, 0).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 2);
    assert_eq!(client.send(&long, 0), Err(ChannelError::Full));
    assert_eq!(
        client.send(&Call::SetState { target: 0, records: vec![0; MOST_PAYLOAD] }, 0),
        Err(ChannelError::TooLong(MOST_PAYLOAD + 8))
    );
    for _ in 0..sent {
        assert_eq!(server.poll().unwrap().map(|(_, call)| call), Some(long.clone()));
    }
    assert!(server.poll().unwrap().is_none());
}

#[test]
fn events_arrive_in_order_and_a_reader_that_is_away_fills_the_ring_only() {
    let memory = Memory::new();
    let (mut client, mut server) = memory.ends();
    let event = |n| Event::Log { level: 3, text: format!("record {n}") };
    let sent = (0..).take_while(|n| server.event(&event(*n)).is_ok()).count();
    assert!(sent > 30, "{sent}");
    assert_eq!(server.event(&event(0)), Err(ChannelError::Full));
    for n in 0..sent {
        assert_eq!(client.poll().unwrap(), Some(Incoming::Event(event(n))));
    }
    server.event(&Event::Eoi { gsi: 9 }).unwrap();
    assert_eq!(client.poll().unwrap(), Some(Incoming::Event(Event::Eoi { gsi: 9 })));
}

#[test]
fn a_host_that_takes_requests_and_answers_none_is_not_remembered_for_ever() {
    let memory = Memory::new();
    let (mut client, _) = memory.ends();
    let mut sent = 0;
    let refused = loop {
        match client.send(&Call::Ping, 0) {
            Ok(_) => sent += 1,
            Err(e) => break e,
        }
        // The host's head follows, and that is all it does.
        memory.host_lines.store(host::REQUESTS_HEAD, memory.soc_lines.load(soc::REQUESTS_TAIL));
        assert!(sent < 100_000);
    };
    assert_eq!(refused, ChannelError::Unanswered(sent));
    client.order(&Call::Lines(vec![])).unwrap();
}

#[test]
fn bulk_beyond_what_a_reply_can_have_is_refused_however_large_the_outbox() {
    let memory = Memory { bulk: Heap::new(bulk::MOST * 2), ..Memory::new() };
    let (mut client, mut server) = memory.ends();
    client.send(&Call::Statistics, 0).unwrap();
    let (asked, _) = server.poll().unwrap().unwrap();
    let long = vec![0; bulk::MOST + 8];
    assert_eq!(server.reply(asked, &[], &long), Err(ChannelError::TooLong(bulk::MOST + 8)));
    server.reply(asked, &[], &long[..bulk::MOST]).unwrap();
    // The last word of the reply's header: how much bulk there is.
    memory.replies.store(24, bulk::MOST as u64 + 8);
    assert_eq!(client.poll(), Err(ChannelError::Bulk(bulk::MOST as u32 + 8)));
}

#[test]
fn the_inventory_of_a_server_full_of_virtual_functions_fits_a_reply() {
    let device = |n: u32| PciDevice {
        address: format!("{:04x}:{:02x}:{:02x}.{}", n >> 16, n >> 8 & 0xff, n >> 3 & 0x1f, n & 7),
        vendor: 0x8086,
        device: n as u16,
        class: 0x0002_0000,
        numa_node: 1,
    };
    let text = |text: &str| text.to_owned();
    let mut info = HostInfo {
        cpu_model: text("A CPU"),
        cpu_vendor: text("GenuineIntel"),
        cpu_flags: "flag ".repeat(10_000),
        cpus: 512,
        memory_kib: 1 << 32,
        kernel: text("6.12"),
        nodes: vec![],
        pci: (0..40_000).map(device).collect(),
    };
    let bulk = info.encode();
    assert!((bulk::MOST - 40..=bulk::MOST).contains(&bulk.len()), "{}", bulk.len());
    let read = HostInfo::decode(&bulk).unwrap();
    assert!(read.pci.len() > 3000);
    info.pci.truncate(read.pci.len());
    info.cpu_flags.truncate(1 << 14);
    assert_eq!(read, info);
}

#[test]
fn a_second_bulk_waits_for_the_first_to_be_fetched() {
    let memory = Memory::new();
    let (mut client, mut server) = memory.ends();
    for _ in 0..2 {
        client.send(&Call::Statistics, 0).unwrap();
    }
    let (first, _) = server.poll().unwrap().unwrap();
    let (second, _) = server.poll().unwrap().unwrap();
    server.reply(first, &[], &[1; 8]).unwrap();
    assert_eq!(server.reply(second, &[], &[2; 8]), Err(ChannelError::Full));
    assert!(matches!(client.poll(), Ok(Some(Incoming::Reply { bulk, .. })) if bulk == [1; 8]));
    server.reply(second, &[], &[2; 8]).unwrap();
    assert!(matches!(client.poll(), Ok(Some(Incoming::Reply { bulk, .. })) if bulk == [2; 8]));
}

#[test]
fn a_message_of_another_epoch_ends_the_connection() {
    let memory = Memory::new();
    let (mut client, _) = memory.ends();
    let Memory { host_lines, replies, events, soc_lines, requests, bulk } = memory.clone();
    let windows = ServerWindows { host_lines, replies, events, soc_lines, requests, bulk };
    let mut server = Server::new(windows, EPOCH + 1);
    client.send(&Call::Ping, 0).unwrap();
    assert_eq!(server.poll().map(|_| ()), Err(ChannelError::Epoch(EPOCH)));
}

#[test]
fn what_another_connection_left_is_not_believed() {
    let memory = Memory::new();
    let (mut old_client, mut old_server) = memory.ends();
    for _ in 0..9 {
        old_client.send(&Call::Statistics, 0).unwrap();
        let (asked, _) = old_server.poll().unwrap().unwrap();
        old_server.reply(asked, b"old", b"old bulk").unwrap();
        old_server.event(&Event::Eoi { gsi: 1 }).unwrap();
        while old_client.poll().unwrap().is_some() {}
    }
    old_client.send(&Call::Shutdown, 0).unwrap();
    old_server.event(&Event::Eoi { gsi: 2 }).unwrap();

    // The next SoC begins while the host's words are still the old ones, and asks at once.
    let Memory { host_lines, replies, events, soc_lines, requests, bulk } = memory.clone();
    let windows = ClientWindows { host_lines, replies, events, soc_lines, requests, bulk };
    let mut client = Client::new(windows, EPOCH + 1);
    let sequence = client.send(&Call::Ping, 0).unwrap();
    assert_eq!(client.poll(), Ok(None));
    let Memory { host_lines, replies, events, soc_lines, requests, bulk } = memory.clone();
    let windows = ServerWindows { host_lines, replies, events, soc_lines, requests, bulk };
    let mut server = Server::new(windows, EPOCH + 1);
    assert_eq!(client.poll(), Ok(None));
    let (asked, call) = server.poll().unwrap().unwrap();
    assert_eq!(call, Call::Ping);
    server.reply(asked, b"new", b"new bulk").unwrap();
    let want = Incoming::Reply { sequence, status: Status::OK, payload: b"new".to_vec(), bulk: b"new bulk".to_vec() };
    assert_eq!(client.poll(), Ok(Some(want)));
    assert_eq!((client.poll(), server.poll().map(|_| ())), (Ok(None), Ok(())));
}

#[test]
fn heartbeats_are_seen_by_the_other_side() {
    let memory = Memory::new();
    let (mut client, mut server) = memory.ends();
    client.beat();
    client.beat();
    server.beat();
    assert_eq!((server.soc_beat(), client.host_beat()), (2, 1));
    assert_eq!((memory.soc_lines.load(soc::HEARTBEAT), memory.host_lines.load(host::HEARTBEAT)), (2, 1));
}

fn calls() -> impl Strategy<Value = Call> {
    prop_oneof![
        Just(Call::Ping),
        Just(Call::Pause(VCPU_ALL)),
        prop::collection::vec(any::<u64>(), 0..20).prop_map(Call::Lines),
        prop::collection::vec(any::<[u64; 3]>(), 0..9).prop_map(|slots| {
            let slot = |[base, len, offset]: [u64; 3]| Memslot { base, len, offset, ram: 1, flags: 0 };
            Call::SetMemslots(slots.into_iter().map(slot).collect())
        }),
        any::<[u64; 3]>().prop_map(|[base, len, ports]| Call::PostedRanges(vec![PostedRange { base, len, ports }])),
        any::<[u64; 2]>().prop_map(|[first, pages]| Call::DirtyFetch(DirtyFetch { ram: 0, flags: 1, first, pages })),
        prop::collection::vec(any::<[u64; 2]>(), 0..9).prop_map(|runs| {
            let run = |[first, pages]: [u64; 2]| LateRun { ram: 2, reserved: 0, first, pages };
            Call::Placed(runs.into_iter().map(run).collect())
        }),
        prop::collection::vec(any::<u8>(), 0..3000).prop_map(|records| Call::SetState { target: 3, records }),
    ]
}

/// A word that the peer writes where it may write.
#[derive(Clone, Debug)]
struct Scribble {
    region: usize,
    word: usize,
    value: u64,
}

fn scribbles() -> impl Strategy<Value = Vec<Scribble>> {
    // Small values hit tails, heads and lengths; others hit everything else.
    let value = prop_oneof![0u64..2048, any::<u64>(), Just(u64::MAX), Just(0)];
    let near = prop_oneof![0usize..64, any::<usize>()];
    let one = (any::<usize>(), near, value).prop_map(|(region, word, value)| Scribble { region, word, value });
    prop::collection::vec(one, 0..40)
}

fn scribble(regions: &[&Heap], Scribble { region, word, value }: &Scribble) {
    let region = regions[region % regions.len()];
    region.store(word % (region.len() / 8) * 8, *value);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_call_arrives_as_it_was_sent(calls in prop::collection::vec(calls(), 1..20)) {
        let memory = Memory::new();
        let (mut client, mut server) = memory.ends();
        for call in calls {
            client.send(&call, 0).unwrap();
            let (asked, got) = server.poll().unwrap().unwrap();
            prop_assert_eq!(got, call);
            server.reply(asked, &[], &[]).unwrap();
            prop_assert!(client.poll().unwrap().is_some());
        }
    }

    #[test]
    fn a_hostile_host_gets_typed_errors_only(scribbles in scribbles(), calls in prop::collection::vec(calls(), 0..4)) {
        let memory = Memory::new();
        let (mut client, mut server) = memory.ends();
        for call in calls {
            client.send(&call, 0).unwrap();
            if let Some((asked, _)) = server.poll().unwrap() {
                server.reply(asked, b"x", b"bulk").unwrap();
            }
        }
        for one in &scribbles {
            scribble(&memory.host_side(), one);
            // At most a ring of messages can come of one look; then an error ends the connection.
            for _ in 0..2048 {
                match client.poll() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
        }
    }

    #[test]
    fn a_hostile_soc_gets_typed_errors_only(scribbles in scribbles(), calls in prop::collection::vec(calls(), 0..4)) {
        let memory = Memory::new();
        let (mut client, mut server) = memory.ends();
        for call in calls {
            client.send(&call, 0).unwrap();
        }
        for one in &scribbles {
            scribble(&memory.soc_side(), one);
            for _ in 0..2048 {
                match server.poll() {
                    Ok(Some((asked, _))) => if server.reply(asked, &[0; 100], &[]).is_err() {
                        return Ok(());
                    },
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
        }
    }

    #[test]
    fn any_payload_is_a_call_or_malformed(opcode: u16, payload in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(Some(call)) = Call::decode(opcode, &payload) {
            prop_assert_eq!(call.opcode(), opcode);
            prop_assert_eq!(Call::decode(opcode, &call.encode()), Ok(Some(call)));
        }
        if let Ok(Some(event)) = Event::decode(opcode, &payload) {
            prop_assert_eq!(event.opcode(), opcode);
        }
    }
}
