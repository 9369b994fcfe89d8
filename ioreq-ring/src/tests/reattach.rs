//! A SoC process that dies between any two stores leaves a lane that the next one finishes.

use std::cell::Cell;
use std::rc::Rc;

use proptest::prelude::*;

use super::{Heap, Host, Memory, carried};
use crate::{BusError, BusMemory, Completion, Direction, Kind, Phase, Posted, Request, SocLane, drain};

/// Memory as a process sees it that dies after so many stores. What it does afterwards nobody sees.
#[derive(Debug)]
struct Mortal {
    heap: Heap,
    stores_left: Rc<Cell<u32>>,
}

impl BusMemory for Mortal {
    fn len(&self) -> usize {
        self.heap.len()
    }
    fn load(&self, offset: usize) -> u64 {
        self.heap.load(offset)
    }
    fn store(&self, offset: usize, word: u64) {
        if let Some(left) = self.stores_left.get().checked_sub(1) {
            self.stores_left.set(left);
            self.heap.store(offset, word);
        }
    }
    fn store_line(&self, offset: usize, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            self.store(offset + i * 8, *word);
        }
    }
    fn copy_in(&self, offset: usize, data: &[u8]) {
        self.heap.copy_in(offset, data);
    }
    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        self.heap.copy_out(offset, data);
    }
    fn fence(&self) {}
    fn flush(&self) -> Result<(), BusError> {
        Ok(())
    }
}

/// One process's life: it takes over, then serves until it dies or nothing is left to do. Requests that it answered, and posted
/// writes that it served, while it lived.
fn live(memory: &Memory, process: u64, stores: u32, answered: &mut Vec<u64>, served: &mut Vec<u64>) {
    let stores_left = Rc::new(Cell::new(stores));
    let mortal = |heap: &Heap| Mortal { heap: heap.clone(), stores_left: stores_left.clone() };
    let mut lanes = [SocLane::new(memory.soc_windows(mortal))];
    let mut request = match lanes[0].phase() {
        Phase::Free => None,
        Phase::Processing => Some(lanes[0].in_flight().unwrap()),
        Phase::Answered => {
            lanes[0].resend().unwrap();
            None
        }
    };
    while stores_left.get() > 0 {
        let taken = match request.take() {
            Some(request) => Some(request),
            None => lanes[0].poll().unwrap(),
        };
        drain(&mut lanes, |_, write| {
            // What the device keeps of it is a store of its own.
            if let Some(left) = stores_left.get().checked_sub(1) {
                stores_left.set(left);
                served.push(write.request.data);
            }
        })
        .unwrap();
        let Some(request) = taken else { return };
        if stores_left.get() == 0 {
            return;
        }
        let before = SocLane::<Mortal, Mortal, _>::answered(&memory.private_of(&mortal));
        lanes[0].complete(&Completion::ok(request.data << 32 | process)).unwrap();
        if SocLane::<Mortal, Mortal, _>::answered(&memory.private_of(&mortal)) != before {
            answered.push(request.data << 32 | process);
        }
    }
}

impl Memory {
    fn private_of<W>(&self, through: &impl Fn(&Heap) -> W) -> W {
        through(&self.private)
    }
}

proptest! {
    #[test]
    fn every_request_is_finished_once(
        (requests, posts) in (carried(), carried()),
        synchronous in prop::collection::vec(any::<bool>(), 1..40),
        lives in prop::collection::vec(0u32..30, 0..40),
    ) {
        let memory = Memory::after(requests, posts);
        let mut host = Host::after(memory.host_windows(), requests, posts);
        let mut lives = lives.into_iter().zip(0..);
        let (mut answered, mut served) = (Vec::new(), Vec::new());
        let (mut sent, mut got, mut deaths) = (Vec::new(), Vec::new(), 0);
        for (i, synchronous) in synchronous.into_iter().enumerate() {
            let write = Request::access(Kind::MMIO, Direction::Write, 0, i as u64, 8, i as u64);
            if !synchronous {
                prop_assert_ne!(host.post(&write), Ok(Posted::Full));
                sent.push(i as u64);
                continue;
            }
            host.submit(&write).unwrap();
            let completion = loop {
                let (stores, process) = lives.next().unwrap_or((u32::MAX, 99));
                live(&memory, process, stores, &mut answered, &mut served);
                deaths += 1;
                if let Some(completion) = host.poll().unwrap() {
                    break completion;
                }
            };
            prop_assert_eq!(completion.data >> 32, i as u64);
            got.push(completion.data);
        }
        live(&memory, 99, u32::MAX, &mut answered, &mut served);
        // What was written down is what the host got, once for each request.
        prop_assert_eq!(got, answered);
        // A death may take the one write with it that was just taken off the ring; none is served twice or out of order.
        let lost = sent.len() - served.len();
        let mut remaining = sent.into_iter();
        prop_assert!(served.into_iter().all(|write| remaining.any(|sent| sent == write)));
        prop_assert!(lost <= deaths);
    }
}
