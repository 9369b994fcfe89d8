//! The SoC's end: reaches everything, and looks whether it is as it must be.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use pcie_function::header::{HostHeader, SocHeader, VERSION};
use pcie_function::{BusError, BusMemory, Doorbell, SocFunction};

use crate::order::{ANSWER, MAILBOX, ORDER, RAM, code};
use crate::{Failure, eventually, pattern, sum};

/// How often the round is made that is timed.
const ROUNDS: u32 = 200;

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// The host's header.
    pub header: HostHeader,
    /// Vectors of the host's function.
    pub vectors: u32,
    /// A round of order, vector, answer, doorbell.
    pub round: Duration,
    /// Copies to and from RAM, in bytes a second.
    pub bandwidth: (u64, u64),
}

/// Tries everything that a function does.
///
/// # Errors
/// The first thing that isn't as it must be.
pub fn check<F: SocFunction>(function: &F) -> Result<Report, Failure> {
    let mut end = End::new(function)?;
    end.card_memory_is_shared()?;
    let began = Instant::now();
    for round in 0..ROUNDS {
        let answer = end.order(code::ECHO, u64::from(round) << 32 | 7)?;
        must(answer == u64::from(round) << 32 | 7, "an echo", answer)?;
    }
    let round = began.elapsed() / ROUNDS;
    end.outbox_is_read_only()?;
    let bandwidth = end.ram_is_reached()?;
    end.what_is_not_mapped_faults()?;
    let vectors = end.vectors_arrive()?;
    must(end.order(code::CHECK, 0)? == 0, "the host's check", "the function is lost")?;
    function.check().map_err(|e| format!("the SoC's check: {e}"))?;
    end.order(code::END, 0)?;
    Ok(Report { header: end.header, vectors, round, bandwidth })
}

/// The SoC's end of a function that the host offers.
struct End<'a, F: SocFunction> {
    function: &'a F,
    card: F::Card,
    inbox: F::Remote,
    header: HostHeader,
    rung: OwnedFd,
    number: u64,
}

impl<'a, F: SocFunction> End<'a, F> {
    /// Waits for the host's header and answers it.
    fn new(function: &'a F) -> Result<Self, Failure> {
        let dup = |bell| function.doorbell(bell).try_clone_to_owned().map_err(|e| e.to_string());
        let card = function.card_memory();
        let header = eventually("the host's header", dup(Doorbell::Channel)?.as_fd(), || {
            HostHeader::load(&card).map_err(|e| e.to_string())
        })?;
        let inbox = function.remote(header.inbox, header.inbox_len as usize);
        SocHeader { version: VERSION, features: 0, host_nonce: header.nonce, nonce: 0xabc }.store(&inbox);
        inbox.flush().map_err(|e| format!("the SoC's header: {e}"))?;
        function.raise(0);
        Ok(Self { function, card, inbox, header, rung: dup(Doorbell::Lanes)?, number: 0 })
    }

    /// Gives an order, and waits for its answer.
    fn order(&mut self, code: u64, argument: u64) -> Result<u64, Failure> {
        self.number += 1;
        self.inbox.store_line(ORDER, &[code, argument, self.number]);
        self.function.raise(0);
        let (card, number) = (&self.card, self.number);
        eventually(&format!("the answer to order {code}, {argument}"), self.rung.as_fd(), || {
            Ok((card.load(ANSWER + 8) == number).then(|| card.load(ANSWER)))
        })
    }

    /// What this side stores in card memory stays there, word by word.
    fn card_memory_is_shared(&self) -> Result<(), Failure> {
        let last = self.card.len() - 4096;
        let bytes = pattern(3, 4096);
        self.card.copy_in(last, &bytes);
        let mut found = vec![0; 4096];
        self.card.copy_out(last, &mut found);
        must(found == bytes, "card memory", "other bytes")
    }

    fn outbox_is_read_only(&mut self) -> Result<(), Failure> {
        self.order(code::FILL, 11)?;
        let mut found = vec![0; MAILBOX];
        self.function.read(self.header.outbox, &mut found).map_err(|e| format!("reading the outbox: {e}"))?;
        must(found == pattern(11, MAILBOX), "the outbox", "other bytes")?;
        let written = self.function.write(self.header.outbox, &[1; 8]);
        must(written == Err(BusError::Dma), "writing the outbox", written)
    }

    /// Copies to and from each RAM; bytes a second of the larger one.
    fn ram_is_reached(&mut self) -> Result<(u64, u64), Failure> {
        let mut bandwidth = (0, 0);
        for (number, (iova, len)) in RAM.into_iter().enumerate() {
            let bytes = pattern(number as u64 + 20, len);
            let began = Instant::now();
            self.function.write(iova, &bytes).map_err(|e| format!("writing RAM {number}: {e}"))?;
            let wrote = began.elapsed();
            must(self.order(code::SUM, number as u64)? == sum(&bytes), "the host's RAM", "other bytes")?;
            let mut found = vec![0; len];
            let began = Instant::now();
            self.function.read(iova, &mut found).map_err(|e| format!("reading RAM {number}: {e}"))?;
            let read = began.elapsed();
            must(found == bytes, "RAM", "other bytes")?;
            let rate = |time: Duration| (len as f64 / time.as_secs_f64()) as u64;
            bandwidth = (rate(wrote), rate(read));
        }
        Ok(bandwidth)
    }

    fn what_is_not_mapped_faults(&mut self) -> Result<(), Failure> {
        let mut word = [0; 8];
        for (number, (iova, len)) in RAM.into_iter().enumerate() {
            let end = iova + len as u64;
            let past = self.function.write(end, &[1; 8]);
            must(past == Err(BusError::Dma), "a write past RAM", past)?;
            self.order(code::UNMAP, number as u64)?;
            for at in [iova, end - 8] {
                let (wrote, read) = (self.function.write(at, &[1; 8]), self.function.read(at, &mut word));
                must(wrote == Err(BusError::Dma), "a write after the unmap", wrote)?;
                must(read == Err(BusError::Dma), "a read after the unmap", read)?;
            }
            self.order(code::MAP, number as u64)?;
            let again = self.function.write(end - 8, &[1; 8]);
            must(again == Ok(()), "a write after the map", again)?;
        }
        Ok(())
    }

    /// The first vectors, one in the middle, the last; how many there are.
    fn vectors_arrive(&mut self) -> Result<u32, Failure> {
        let count = self.order(code::VECTORS, 0)? as u32;
        must(count >= 8, "the number of vectors", count)?;
        for vector in [1, 2, 5, count / 2, count - 1] {
            let early = self.order(code::VECTOR, u64::from(vector))?;
            must(early == 0, "a vector that was not raised", vector)?;
            self.function.raise(vector);
            let raised = self.order(code::VECTOR, u64::from(vector))?;
            must(raised == 1, "a vector that was raised", vector)?;
        }
        Ok(count)
    }
}

fn must(holds: bool, what: &str, found: impl std::fmt::Debug) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(format!("{what}: {found:?}")) }
}
