//! The host's end: offers memory, and obeys.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use pcie_function::header::{HostHeader, Role, SocHeader, VERSION};
use pcie_function::{Bell, BusMemory, Doorbell, FunctionError, HostFunction, Mapping, Reach, Window};

use crate::order::{ANSWER, MAILBOX, ORDER, RAM, code};
use crate::{Failure, eventually, pattern, sum, wait};

/// Names the offer: any number but 0.
const NONCE: u64 = 0x5eed_0f0f_1234_4321;

/// Offers the function and obeys its SoC's end until that says to end; `say` is told how it goes.
///
/// # Errors
/// What went wrong.
pub fn serve<F: HostFunction>(mut function: F, role: Role, say: &mut impl FnMut(&str)) -> Result<(), Failure> {
    let told = |e: FunctionError| e.to_string();
    let (inbox_iova, inbox) = function.map_mailbox(MAILBOX, true).map_err(told)?;
    let (outbox_iova, outbox) = function.map_mailbox(MAILBOX, false).map_err(told)?;
    let ram = [Ram::new(0, false)?, Ram::new(1, true)?];
    for ram in &ram {
        ram.map(&mut function)?;
    }
    say(&format!("mailbox at {inbox_iova:#x} and {outbox_iova:#x}"));

    let (card, bell) = (function.card_memory(), function.bell());
    card.store(ANSWER + 8, 0);
    let header = HostHeader {
        versions: (VERSION, VERSION),
        features: 0,
        inbox: inbox_iova,
        inbox_len: MAILBOX as u32,
        outbox: outbox_iova,
        outbox_len: MAILBOX as u32,
        table: pcie_function::regions::TABLE,
        regions: 0,
        role,
        nonce: NONCE,
    };
    header.store(&card);
    card.flush().map_err(|e| e.to_string())?;
    bell.ring(Doorbell::Channel);
    say("offered");
    let woken = |function: &F| function.vector(0).map(|event| event.try_clone_to_owned()).transpose();
    let woken: OwnedFd = woken(&function).ok().flatten().ok_or("vector 0 can't be had")?;
    let soc =
        eventually("the SoC's header", woken.as_fd(), || SocHeader::load(&inbox, NONCE).map_err(|e| e.to_string()))?;
    say(&format!("negotiated version {}", soc.version));

    for number in 1.. {
        let [order, argument] = eventually("an order", woken.as_fd(), || {
            let there = inbox.load(ORDER + 16) == number;
            Ok(there.then(|| [inbox.load(ORDER), inbox.load(ORDER + 8)]))
        })?;
        let of_ram = || ram.get(argument as usize).ok_or_else(|| format!("there is no RAM {argument}"));
        let answer = match order {
            code::ECHO => argument,
            code::FILL => {
                outbox.copy_in(0, &pattern(argument, MAILBOX));
                0
            }
            code::SUM => of_ram()?.sum(),
            code::UNMAP => {
                function.unmap(RAM[of_ram()?.number].0).map_err(told)?;
                0
            }
            code::MAP => {
                of_ram()?.map(&mut function)?;
                0
            }
            code::VECTOR => {
                let event = function.vector(argument as u32).ok_or_else(|| format!("there is no vector {argument}"))?;
                u64::from(wait(event, Duration::from_secs(1)))
            }
            code::VECTORS => function.vectors().into(),
            code::CHECK => u64::from(function.check().is_err()),
            code::END => 0,
            other => return Err(format!("there is no order {other}")),
        };
        card.store_line(ANSWER, &[answer, number]);
        bell.ring(Doorbell::Lanes);
        if order == code::END {
            break;
        }
    }
    say("ended as told");
    Ok(())
}

/// Some RAM.
struct Ram {
    number: usize,
    file: OwnedFd,
    memory: Window,
}

impl Ram {
    fn new(number: usize, huge: bool) -> Result<Self, Failure> {
        let len = RAM[number].1;
        let flags = if huge { MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB } else { MFdFlags::empty() };
        let file = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC | flags).map_err(|e| format!("RAM {number}: {e}"))?;
        nix::unistd::ftruncate(&file, len as i64).map_err(|e| format!("RAM {number}: {e}"))?;
        let mapping = Mapping::new(file.as_fd(), 0, len, Reach::Local).map_err(|e| format!("RAM {number}: {e}"))?;
        Ok(Self { number, file, memory: mapping.window() })
    }

    fn map(&self, function: &mut impl HostFunction) -> Result<(), Failure> {
        let (iova, len) = RAM[self.number];
        function.map_ram(self.file.as_fd(), 0, iova, len as u64, true).map_err(|e| format!("RAM {}: {e}", self.number))
    }

    fn sum(&self) -> u64 {
        let mut bytes = vec![0; self.memory.len()];
        self.memory.copy_out(0, &mut bytes);
        sum(&bytes)
    }
}
