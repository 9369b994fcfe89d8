//! The SoC's end of the API channel against a host that stores any word, message and bulk.
#![no_main]

use api_channel::Incoming;
use api_channel::call::{CpuidEntry, DirtyRun, Extent, HostInfo, Statistic, VmCreated};
use api_channel::codec::Reader;
use api_channel::event::Event;
use api_channel::lines::host;
use api_channel::message::MOST_PAYLOAD;
use api_channel::state::records;
use fuzz::Word;
use fuzz::channel::{Ask, Memory, Message, answer, put_good};
use ioreq_ring::BusMemory;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Window {
    Lines,
    Replies,
    Events,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Store {
        window: Window,
        index: u16,
        word: Word,
    },
    Reply(Message<'a>),
    Event(Message<'a>),
    /// An answer to a request that was sent, in any order.
    Answer {
        which: u8,
        status: u32,
        bulk: u16,
        payload: &'a [u8],
    },
    Bulk(&'a [u8]),
    Ask(Ask),
    Order(Ask),
    /// The host reads what was sent.
    Read,
    Poll,
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let memory = Memory::new();
    let mut client = memory.client();
    let mut asked = Vec::new();
    for step in steps {
        match step {
            Step::Store { window, index, word } => {
                let window = match window {
                    Window::Lines => &memory.host_lines,
                    Window::Replies => &memory.replies,
                    Window::Events => &memory.events,
                };
                word.store(window, index);
            }
            Step::Reply(message) => message.put(&memory.replies, &memory.host_lines, host::REPLIES_TAIL),
            Step::Event(message) => message.put(&memory.events, &memory.host_lines, host::EVENTS_TAIL),
            Step::Answer { which, status, bulk, payload } => {
                if asked.is_empty() {
                    continue;
                }
                let (sequence, opcode) = asked[usize::from(which) % asked.len()];
                let header = answer(opcode, sequence, status, bulk.into());
                put_good(&memory.replies, &memory.host_lines, host::REPLIES_TAIL, &header, payload);
            }
            Step::Bulk(bytes) => memory.bulk.copy_in(0, &bytes[..bytes.len().min(memory.bulk.len())]),
            Step::Ask(ask) => {
                let call = ask.call();
                if let Ok(sequence) = client.send(&call, 0) {
                    asked.push((sequence, call.opcode()));
                }
            }
            Step::Order(ask) => drop(client.order(&ask.call())),
            Step::Read => {
                let tail = memory.soc_lines.load(api_channel::lines::soc::REQUESTS_TAIL);
                memory.host_lines.store(host::REQUESTS_HEAD, tail);
            }
            Step::Poll => match client.poll() {
                Ok(Some(Incoming::Reply { sequence, payload, bulk, .. })) => {
                    let at = asked.iter().position(|(asked, _)| *asked == sequence).expect("it was asked");
                    asked.swap_remove(at);
                    assert!(payload.len() <= MOST_PAYLOAD && bulk.len() <= memory.bulk.len());
                    read(&payload, &bulk);
                }
                Ok(Some(Incoming::Event(event))) => {
                    assert!(matches!(Event::decode(event.opcode(), &event.encode()), Ok(Some(_))), "{event:?}");
                }
                Ok(None) => {}
                // The connection is over.
                Err(_) => return,
            },
        }
    }
});

/// Reads an answer as everything that an answer can be.
fn read(payload: &[u8], bulk: &[u8]) {
    let _ = Reader::new(payload).take::<VmCreated>();
    let _ = Reader::new(payload).list::<Extent>(1024);
    let _ = Reader::new(bulk).list::<CpuidEntry>(1024);
    let _ = Reader::new(bulk).list::<DirtyRun>(1 << 16);
    let _ = Reader::new(bulk).list::<Statistic>(1 << 16);
    let _ = records(bulk);
    if let Ok(info) = HostInfo::decode(bulk) {
        assert_eq!(info.encode(), bulk);
    }
}
