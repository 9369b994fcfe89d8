//! The API channel's memory, and messages that a hostile peer puts there by hand.

use api_channel::call::Call;
use api_channel::lines::host;
use api_channel::message::{HEADER, Header, SLOT, Status};
use api_channel::{Client, ClientWindows, Server, ServerWindows};
use arbitrary::Arbitrary;
use ioreq_ring::BusMemory;
use wire_kit::Heap;

/// The connection's epoch.
pub const EPOCH: u64 = 0x1122_3344_5566_7788;

/// All memory of a channel.
pub struct Memory {
    pub host_lines: Heap,
    pub replies: Heap,
    pub events: Heap,
    pub soc_lines: Heap,
    pub requests: Heap,
    pub bulk: Heap,
}

impl Memory {
    /// Zeroed memory, with rings so small that they wrap and fill up.
    pub fn new() -> Self {
        Self {
            host_lines: Heap::new(1024),
            replies: Heap::new(64 * SLOT),
            events: Heap::new(16 * SLOT),
            soc_lines: Heap::new(1024),
            requests: Heap::new(64 * SLOT),
            bulk: Heap::new(4096),
        }
    }

    /// The SoC's end.
    pub fn client(&self) -> Client<Heap, Heap> {
        let windows = ClientWindows {
            host_lines: self.host_lines.clone(),
            replies: self.replies.clone(),
            events: self.events.clone(),
            soc_lines: self.soc_lines.clone(),
            requests: self.requests.clone(),
            bulk: self.bulk.clone(),
        };
        let client = Client::new(windows, EPOCH);
        self.host_lines.store(host::EPOCH, EPOCH);
        client
    }

    /// The host's end.
    pub fn server(&self) -> Server<Heap, Heap> {
        let windows = ServerWindows {
            host_lines: self.host_lines.clone(),
            replies: self.replies.clone(),
            events: self.events.clone(),
            soc_lines: self.soc_lines.clone(),
            requests: self.requests.clone(),
            bulk: self.bulk.clone(),
        };
        Server::new(windows, EPOCH)
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

/// A message as a peer may put it. Most of them have the right epoch and length.
#[derive(Arbitrary, Debug)]
pub struct Message<'a> {
    pub opcode: u16,
    class: u8,
    sequence: u32,
    status: u32,
    extra: u32,
    epoch: Option<u64>,
    length: Option<u32>,
    payload: &'a [u8],
}

impl Message<'_> {
    /// Puts it into `ring` behind the tail at `lines[tail]`, as far as one ring holds it.
    pub fn put(&self, ring: &Heap, lines: &Heap, tail: usize) {
        let first = u64::from(self.opcode)
            | u64::from(self.class) << 16
            | u64::from(self.length.unwrap_or(self.payload.len() as u32)) << 32;
        let words = [
            first,
            u64::from(self.sequence) | u64::from(self.status) << 32,
            self.epoch.unwrap_or(EPOCH),
            self.extra.into(),
        ];
        put(ring, lines, tail, &words.map(u64::to_le_bytes).concat(), self.payload);
    }
}

/// Puts a message with a good header into `ring`, likewise.
pub fn put_good(ring: &Heap, lines: &Heap, tail: usize, header: &Header, payload: &[u8]) {
    let header = Header { length: payload.len() as u32, epoch: EPOCH, ..*header };
    put(ring, lines, tail, &header.to_bytes(), payload);
}

fn put(ring: &Heap, lines: &Heap, tail: usize, header: &[u8], payload: &[u8]) {
    let slots = ring.len() / SLOT;
    let mut bytes = [header, payload].concat();
    bytes.truncate(ring.len());
    bytes.resize(bytes.len().next_multiple_of(SLOT), 0);
    let at = lines.load(tail);
    for (n, slot) in (0..).zip(bytes.chunks(SLOT)) {
        ring.copy_in((at.wrapping_add(n) % slots as u64) as usize * SLOT, slot);
    }
    lines.store(tail, at.wrapping_add((bytes.len() / SLOT) as u64));
}

/// A call of each shape that an answer can have.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Ask {
    Ping,
    HostInfo,
    SupportedCpuid,
    Pause,
    Statistics,
    SetState(u8),
}

impl Ask {
    /// The call.
    pub fn call(self) -> Call {
        match self {
            Self::Ping => Call::Ping,
            Self::HostInfo => Call::HostInfo,
            Self::SupportedCpuid => Call::SupportedCpuid,
            Self::Pause => Call::Pause(0),
            Self::Statistics => Call::Statistics,
            Self::SetState(len) => Call::SetState { target: 0, records: vec![len; usize::from(len) * 16] },
        }
    }
}

/// The header of an answer to `opcode` and `sequence`.
pub fn answer(opcode: u16, sequence: u32, status: u32, extra: u32) -> Header {
    let class = api_channel::message::Class::Reply;
    Header { opcode, class, length: 0, sequence, status: Status(status), epoch: EPOCH, extra }
}

const _: () = assert!(HEADER < SLOT);
