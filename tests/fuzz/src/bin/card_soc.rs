//! The driver of a card's SoC side against a card that answers registers and descriptors with anything.
#![no_main]

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{LazyLock, Mutex, MutexGuard};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::EventFd;
use pcie_function::card::queue::{Descriptor, Done, status};
use pcie_function::card::soc::{SocCard, Transport};
use pcie_function::card::{self, bar, register};
use pcie_function::local::sealed_memfd;
use pcie_function::{BusError, BusMemory, FunctionError, Iova, Mapping, Reach, SocFunction, Window};
use zerocopy::IntoBytes;

/// Where the card sees the queue's memory.
const IOVA: Iova = 1 << 20;

static CARD_MEMORY: LazyLock<OwnedFd> =
    LazyLock::new(|| sealed_memfd("card", bar::MEMORY_MIN).expect("a memfd of 1 MiB"));

/// How the card answers a descriptor.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Answer {
    Good,
    Bad {
        status: u32,
        transferred: u32,
        fault: u64,
    },
    /// The record of another descriptor, or one with reserved bits.
    Words([u64; 4]),
    /// None, and the card is gone.
    Gone,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Store {
        page: u8,
        len: u32,
    },
    Line {
        page: u8,
        word: u64,
    },
    Load {
        page: u8,
    },
    Read {
        iova: u64,
        len: u32,
    },
    Write {
        iova: u64,
        len: u32,
    },
    Raise(u32),
    Flush,
    Check,
    Renew,
    /// A register has another value from now on.
    Register {
        number: u8,
        value: u64,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    registers: Vec<(u8, u64)>,
    answers: Vec<Answer>,
    steps: Vec<Step>,
}

/// The card. There is one at a time.
#[derive(Debug, Default)]
struct State {
    registers: BTreeMap<u64, u64>,
    answers: VecDeque<Answer>,
    memory: Option<Window>,
    head: u32,
    /// What the first descriptor carried.
    generation: Option<u32>,
    gone: bool,
}

/// Its registers, as the driver reaches them.
#[derive(Debug)]
struct Card {
    event: EventFd,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().expect("no panic under the lock")
}

/// The register of a number: those that are there.
fn register(number: u8) -> u64 {
    const ALL: [u64; 9] = [
        register::MAGIC,
        register::VERSION,
        register::ROLE,
        register::MEMORY_SIZE,
        register::VECTORS,
        register::STATUS,
        register::EVENTS,
        register::DMA_STATUS,
        register::DMA_HEAD,
    ];
    ALL[usize::from(number) % ALL.len()]
}

impl State {
    fn read(&self, register: u64) -> u64 {
        self.registers.get(&register).copied().unwrap_or(0)
    }

    /// Answers descriptors up to `tail`.
    fn carry_out(&mut self, tail: u32) {
        let entries = self.read(register::DMA_ENTRIES) as u32;
        let done_ring = (self.read(register::DMA_DONE) - IOVA) as usize;
        let Some(memory) = self.memory.clone() else { return };
        assert!(tail.wrapping_sub(self.head) <= entries, "more than the ring has");
        while self.head != tail && !self.gone {
            let slot = (self.head % entries) as usize;
            let generation = (memory.load(slot * size_of::<Descriptor>()) >> 32) as u32;
            assert_eq!(*self.generation.get_or_insert(generation), generation, "one queue, one generation");
            let sequence = memory.load(slot * size_of::<Descriptor>() + 56);
            let done = match self.answers.pop_front().unwrap_or(Answer::Good) {
                Answer::Good => Some(Done::new(status::OK, 0, 0, sequence)),
                Answer::Bad { status, transferred, fault } => Some(Done::new(status, transferred, fault, sequence)),
                Answer::Words(words) => {
                    memory.copy_in(done_ring + slot * size_of::<Done>(), words.as_bytes());
                    // A driver that sees nothing of its own waits until the card is gone.
                    self.gone = words[3] != sequence;
                    None
                }
                Answer::Gone => {
                    self.gone = true;
                    None
                }
            };
            if let Some(done) = done {
                memory.copy_in(done_ring + slot * size_of::<Done>(), done.as_bytes());
            }
            self.head = self.head.wrapping_add(1);
        }
    }
}

impl Transport for Card {
    fn read32(&self, register: u64) -> Result<u32, FunctionError> {
        Ok(state().read(register) as u32)
    }

    fn read64(&self, register: u64) -> Result<u64, FunctionError> {
        Ok(state().read(register))
    }

    fn write32(&self, register: u64, value: u32) -> Result<(), FunctionError> {
        self.write64(register, value.into())
    }

    fn write64(&self, register: u64, value: u64) -> Result<(), FunctionError> {
        state().registers.entry(register).or_insert(value);
        Ok(())
    }

    fn post(&self, register: u64, value: u32) -> Result<(), BusError> {
        assert_eq!(register, register::DMA_TAIL);
        state().carry_out(value);
        Ok(())
    }

    fn is_there(&self) -> bool {
        !state().gone
    }

    fn lost(&self) -> (BorrowedFd<'_>, EpollFlags) {
        (self.event.as_fd(), EpollFlags::EPOLLIN)
    }

    fn card_memory(&self, len: u64) -> Result<Window, FunctionError> {
        if len != bar::MEMORY_MIN {
            return Err(FunctionError::Unusable("card memory has another size".into()));
        }
        Ok(Mapping::new(CARD_MEMORY.as_fd(), 0, len as usize, Reach::Local)?.window())
    }

    fn give(&mut self, memory: &Window, _: BorrowedFd<'_>) -> Result<Iova, FunctionError> {
        state().memory = Some(memory.clone());
        Ok(IOVA)
    }

    fn set_vector(&self, _: u32, _: BorrowedFd<'_>) -> Result<(), FunctionError> {
        Ok(())
    }
}

fuzz_target!(|input: Input| {
    let good = [
        (register::MAGIC, card::MAGIC.into()),
        (register::VERSION, card::VERSION.into()),
        (register::MEMORY_SIZE, bar::MEMORY_MIN),
        (register::VECTORS, card::HOST_VECTORS_MIN.into()),
        (register::STATUS, 1 << 32 | u64::from(card::STATUS_LINK)),
        (register::DMA_STATUS, card::DMA_ENABLE.into()),
    ];
    let mut registers = BTreeMap::from(good);
    registers.extend(input.registers.into_iter().map(|(number, value)| (register(number), value)));
    *state() = State { registers, answers: input.answers.into(), ..State::default() };
    let Ok(soc) = SocCard::new(Card { event: EventFd::new().expect("an eventfd") }) else { return };
    for step in input.steps.into_iter().take(64) {
        let window = |page: u8, len: u32| soc.remote(u64::from(page) << 12, len.next_multiple_of(8) as usize);
        match step {
            Step::Store { page, len } => {
                let len = len % (300 << 10);
                window(page, len).copy_in(0, &vec![1; len as usize]);
            }
            Step::Line { page, word } => window(page, 64).store_line(0, &[word; 8]),
            Step::Load { page } => drop(window(page, 8).load(0)),
            Step::Read { iova, len } => drop(soc.read(iova, &mut vec![0; (len % (2 << 20)) as usize])),
            Step::Write { iova, len } => drop(soc.write(iova, &vec![0; (len % (2 << 20)) as usize])),
            Step::Raise(vector) => soc.raise(vector),
            Step::Flush => drop(window(0, 8).flush()),
            Step::Check => drop(soc.check()),
            Step::Renew => drop(soc.renew()),
            Step::Register { number, value } => drop(state().registers.insert(register(number), value)),
        }
    }
});
