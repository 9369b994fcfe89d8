//! The host's end of the API channel against a SoC that stores any word and message.
#![no_main]

use api_channel::Status;
use api_channel::call::Call;
use api_channel::event::Event;
use api_channel::lines::{host, soc};
use api_channel::message::{Class, Header};
use api_channel::state::records;
use fuzz::Word;
use fuzz::channel::{EPOCH, Memory, Message, put_good};
use ioreq_ring::BusMemory;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// The opcodes that there are, so that chance need not find them.
const OPCODES: &[u16] = &[
    0x001, 0x010, 0x011, 0x012, 0x100, 0x101, 0x102, 0x110, 0x111, 0x112, 0x200, 0x201, 0x210, 0x211, 0x300, 0x301,
    0x302, 0x400, 0x401, 0x402, 0x403, 0x500, 0x501, 0x502, 0x600, 0x601, 0x610, 0x611, 0x612, 0x613, 0x700, 0xf00,
];

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Store {
        lines: bool,
        index: u16,
        word: Word,
    },
    Message(Message<'a>),
    /// A call with any payload.
    Call {
        which: u8,
        order: bool,
        payload: &'a [u8],
    },
    /// The SoC takes bulk and messages as it should.
    Read,
    /// The host serves what there is.
    Serve {
        refuse: bool,
        payload: u16,
        bulk: u16,
    },
    Report,
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let memory = Memory::new();
    let mut server = memory.server();
    let mut bulks = 0;
    for step in steps {
        match step {
            Step::Store { lines, index, word } => {
                word.store(if lines { &memory.soc_lines } else { &memory.requests }, index);
            }
            Step::Message(message) => message.put(&memory.requests, &memory.soc_lines, soc::REQUESTS_TAIL),
            Step::Call { which, order, payload } => {
                let header = Header {
                    opcode: OPCODES[usize::from(which) % OPCODES.len()],
                    class: if order { Class::Order } else { Class::Request },
                    length: 0,
                    sequence: 1,
                    status: Status::OK,
                    epoch: EPOCH,
                    extra: 0,
                };
                put_good(&memory.requests, &memory.soc_lines, soc::REQUESTS_TAIL, &header, payload);
            }
            Step::Read => {
                memory.soc_lines.store(soc::BULK_FETCHED, bulks);
                memory.soc_lines.store(soc::REPLIES_HEAD, memory.host_lines.load(host::REPLIES_TAIL));
                memory.soc_lines.store(soc::EVENTS_HEAD, memory.host_lines.load(host::EVENTS_TAIL));
            }
            Step::Serve { refuse, payload, bulk } => match server.poll() {
                Ok(Some((asked, call))) => {
                    look_at(&call);
                    let (payload, bulk) = (vec![1; payload.into()], vec![2; bulk.into()]);
                    let (replies, before) = (memory.host_lines.load(host::REPLIES_TAIL), memory.bulk.load(0));
                    let sent = match refuse {
                        true => server.refuse(asked, Status::STATE, "não"),
                        false => server.reply(asked, &payload, &bulk),
                    };
                    if sent.is_err() {
                        return;
                    }
                    let answered = memory.host_lines.load(host::REPLIES_TAIL) != replies;
                    bulks += u64::from(answered && !refuse && !bulk.is_empty());
                    assert!(answered || memory.bulk.load(0) == before, "bulk of nobody");
                }
                Ok(None) => {}
                // The connection is over.
                Err(_) => return,
            },
            Step::Report => {
                let text = "a record".repeat(20);
                if server.event(&Event::Log { level: 3, text }).is_err() {
                    continue;
                }
            }
        }
    }
});

fn look_at(call: &Call) {
    assert_eq!(Call::decode(call.opcode(), &call.encode()), Ok(Some(call.clone())));
    if let Call::SetState { records: list, .. } = call {
        let _ = records(list);
    }
}
