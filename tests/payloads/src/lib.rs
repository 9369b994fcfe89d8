//! Guest payloads: small programs that show one thing each, assembled here instruction by instruction.
//!
//! Every payload speaks the same protocol, so that a VMM, a bare KVM loop or a client of the API channel can drive it:
//!
//! - It writes lines to the debug console (port 0x402). The last one is `pass`, or begins with `fail:`.
//! - It ends by a byte to port 0xf4: [`EXIT_PASS`] or [`EXIT_FAIL`]. Those that need help for it say so ([`Ends`]).
//! - What it touches beyond that (pc-testdev's ports and memory, [`ports::COMMAND`]) stands in each module's table.
//!
//! A 64-bit payload is a [`Kernel`] (PVH ELF or multiboot 1), a real-mode one a [`Firmware`] of 64 KiB. No payload
//! uses more than integer instructions at CPL0, and no paging but 64-bit: software KVM backends run them too.

mod image;
mod kit;
mod payload;

pub use iced_x86::IcedError;
pub use image::{Firmware, Kernel};
pub use kit::layout::{FREE, MAX_VCPUS};
pub use payload::*;

/// What a payload writes to port 0xf4 when all it saw was right. A VMM's exit status is then [`PASSED`].
pub const EXIT_PASS: u8 = 0x10;
/// The exit status of a VMM whose guest has passed.
pub const PASSED: i32 = (EXIT_PASS as i32) << 1 | 1;
/// What a payload writes to port 0xf4 otherwise. A VMM's exit status is then 35.
pub const EXIT_FAIL: u8 = 0x11;

/// Ports that payloads use.
pub mod ports {
    /// isa-debugcon: writes are text, reads give [`DEBUG_CONSOLE_READS`].
    pub const DEBUG_CONSOLE: u16 = 0x402;
    /// What tells a guest that the debug console is there.
    pub const DEBUG_CONSOLE_READS: u8 = 0xe9;
    /// isa-debug-exit.
    pub const DEBUG_EXIT: u16 = 0xf4;
    /// pc-testdev: a register of four bytes that keeps what is written, by any width and offset.
    pub const ECHO: u16 = 0xe0;
    /// pc-testdev: a byte written to port `IRQ_LINES + n` is the level of ISA interrupt n.
    pub const IRQ_LINES: u16 = 0x2000;
    /// No device of any machine: a 32-bit read asks whoever drives the payload what to do, a 32-bit write answers.
    /// All ones, what an unclaimed read gives, means: nothing to do.
    pub const COMMAND: u16 = 0x5f0;
}

/// pc-testdev's memory: 64 KiB outside RAM that keep what is written, by exits.
pub const TEST_MEMORY: u64 = 0xff00_0000;

/// A program for a guest.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Its name, one word.
    pub name: &'static str,
    /// How many vCPUs the VM must have, with APIC ids from 0.
    pub vcpus: u8,
    /// How it comes to its end.
    pub ends: Ends,
    /// What the VMM loads.
    pub image: Image,
}

/// How a payload comes to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// By itself, on any machine with the devices that it touches.
    Alone,
    /// When whoever drives it, behind [`ports::COMMAND`] or with interrupts, has done their part.
    Driven,
    /// Not at all.
    Never,
}

/// The form a payload is loaded in.
#[derive(Debug, Clone)]
pub enum Image {
    /// 64-bit.
    Kernel(Kernel),
    /// Real mode.
    Firmware(Firmware),
}

/// Where a payload's own code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// Kernel mode.
    Cpl0,
    /// User mode, every port open by the TSS's I/O bitmap.
    Cpl3,
}

impl Privilege {
    fn name(self, cpl0: &'static str, cpl3: &'static str) -> &'static str {
        match self {
            Privilege::Cpl0 => cpl0,
            Privilege::Cpl3 => cpl3,
        }
    }
}

impl Payload {
    fn kernel(name: &'static str, vcpus: u8, kernel: Kernel) -> Self {
        Payload { name, vcpus, ends: Ends::Alone, image: Image::Kernel(kernel) }
    }

    fn that_ends(self, ends: Ends) -> Self {
        Payload { ends, ..self }
    }

    fn firmware(name: &'static str, firmware: Firmware) -> Self {
        Payload { name, vcpus: 1, ends: Ends::Alone, image: Image::Firmware(firmware) }
    }

    /// The file that a VMM takes, and by which option of `soc-vmm run`: `--kernel` (PVH ELF) or `--firmware`.
    pub fn file(&self) -> (&'static str, Vec<u8>) {
        match &self.image {
            Image::Kernel(kernel) => ("--kernel", kernel.pvh_elf()),
            Image::Firmware(firmware) => ("--firmware", firmware.bytes().to_vec()),
        }
    }
}
