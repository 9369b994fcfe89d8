//! A peer that never stops sending what nobody understands: each look ends all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use api_channel::lines::{host, soc};
use api_channel::message::{Class, Header, SLOT, Status};
use api_channel::{Client, ClientWindows, Server, ServerWindows};
use ioreq_ring::{BusError, BusMemory};
use wire_kit::Heap;

const EPOCH: u64 = 7;
const SLOTS: usize = 64;

/// Memory of a peer that, whenever its tail is looked at, has just added one more message.
#[derive(Clone)]
struct Busy {
    memory: Heap,
    /// Offset of the tail, and how often it was looked at; none: a ring.
    tail: Option<(usize, Arc<AtomicU64>)>,
}

impl Busy {
    /// A ring full of one-slot messages.
    fn ring(class: Class) -> Self {
        let memory = Heap::new(SLOTS * SLOT);
        let header =
            Header { opcode: 0x7fff, class, length: 0, sequence: 1, status: Status::OK, epoch: EPOCH, extra: 0 };
        (0..SLOTS).for_each(|slot| memory.copy_in(slot * SLOT, &header.to_bytes()));
        Self { memory, tail: None }
    }

    fn looks(&self) -> u64 {
        self.tail.as_ref().map_or(0, |(_, looks)| looks.load(Ordering::Relaxed))
    }
}

impl BusMemory for Busy {
    fn len(&self) -> usize {
        self.memory.len()
    }

    fn load(&self, offset: usize) -> u64 {
        match &self.tail {
            Some((at, looks)) if *at == offset => looks.fetch_add(1, Ordering::Relaxed) + 1,
            _ => self.memory.load(offset),
        }
    }

    fn store(&self, offset: usize, word: u64) {
        self.memory.store(offset, word);
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        self.memory.store_line(offset, words);
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        self.memory.copy_in(offset, data);
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        self.memory.copy_out(offset, data);
    }

    fn fence(&self) {}

    fn flush(&self) -> Result<(), BusError> {
        Ok(())
    }
}

fn lines(tail: usize) -> Busy {
    Busy { memory: Heap::new(1024), tail: Some((tail, Arc::default())) }
}

#[test]
fn events_that_nobody_knows() {
    let host_lines = lines(host::EVENTS_TAIL);
    let windows = ClientWindows {
        host_lines: host_lines.clone(),
        replies: Busy { memory: Heap::new(SLOTS * SLOT), tail: None },
        events: Busy::ring(Class::Event),
        soc_lines: Heap::new(1024),
        requests: Heap::new(SLOTS * SLOT),
        bulk: Heap::new(8),
    };
    let mut client = Client::new(windows, EPOCH);
    host_lines.store(host::EPOCH, EPOCH);
    for look in 1..4 {
        assert_eq!(client.poll(), Ok(None));
        assert_eq!(host_lines.looks(), look * SLOTS as u64, "the rest waits for the next look");
    }
}

#[test]
fn orders_that_nobody_knows() {
    let soc_lines = lines(soc::REQUESTS_TAIL);
    let windows = ServerWindows {
        host_lines: Heap::new(1024),
        replies: Heap::new(SLOTS * SLOT),
        events: Heap::new(SLOTS * SLOT),
        soc_lines: soc_lines.clone(),
        requests: Busy::ring(Class::Order),
        bulk: Busy { memory: Heap::new(8), tail: None },
    };
    let mut server = Server::new(windows, EPOCH);
    for look in 1..4 {
        assert!(matches!(server.poll(), Ok(None)));
        assert_eq!(soc_lines.looks(), look * SLOTS as u64, "the rest waits for the next look");
    }
}
