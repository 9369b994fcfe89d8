//! Memory-mapped I/O of every length from 1 to 8 bytes, inside a page and across its end.
//!
//! KVM splits an access at the end of a page and hands each part out by an exit of its own: 8 bytes that begin n bytes
//! before the end give n and 8 − n, so lengths that no instruction has (3, 5, 6, 7) come up too.
//!
//! | touches | how |
//! | --- | --- |
//! | [`TEST_MEMORY`] | for each entry of [`accesses`]: writes, reads it back whole and byte by byte, then adds to it in place |

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::{IcedError, Payload, TEST_MEMORY};

const PAGE: u64 = 4096;
const PATTERN: u64 = 0x1122_3344_5566_7788;
const ADDEND: u64 = 0x0101_0101_0101_0101;

/// One access of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub width: u8,
}

impl Access {
    /// The exits that it comes to: address and length each, in order.
    pub fn fragments(&self) -> Vec<(u64, u8)> {
        let to_page_end = PAGE - self.address % PAGE;
        if to_page_end >= self.width.into() {
            return vec![(self.address, self.width)];
        }
        let first = to_page_end as u8;
        vec![(self.address, first), (self.address + to_page_end, self.width - first)]
    }

    /// What the payload writes there.
    pub fn value(&self) -> u64 {
        (PATTERN ^ self.address).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - 8 * u32::from(self.width))
    }

    fn sum(&self) -> u64 {
        self.value().wrapping_add(ADDEND) & u64::MAX >> (64 - 8 * u32::from(self.width))
    }
}

/// What is accessed, in order: every width inside a page, then every way to lie across the end of one.
pub fn accesses() -> Vec<Access> {
    let inside = [1, 2, 4, 8].map(|width| Access { address: TEST_MEMORY + 0x100 + 0x10 * u64::from(width), width });
    let across = [2u8, 4, 8].into_iter().flat_map(|width| {
        // Each at a page end of its own.
        (1..width).map(move |before| {
            let page_end = TEST_MEMORY + PAGE * u64::from(before);
            Access { address: page_end - u64::from(before), width }
        })
    });
    inside.into_iter().chain(across).collect()
}

/// The payload.
pub fn mmio() -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    for access in accesses() {
        let Access { address, width } = access;
        let what = format!("{width} bytes at {address:#x}");
        p.asm.mov(rdi, address)?;
        p.asm.mov(rbx, access.value())?;
        store(&mut p.asm, width)?;
        load(&mut p.asm, width)?;
        p.expect(rax, rbx, &what)?;
        for byte in 0..i32::from(width) {
            p.asm.movzx(eax, byte_ptr(rdi + byte))?;
            p.asm.movzx(ecx, bl)?;
            p.expect(rax, rcx, &format!("byte {byte} of {what}"))?;
            p.asm.ror(rbx, 8)?;
        }
        p.asm.mov(rbx, ADDEND)?;
        add_in_place(&mut p.asm, width)?;
        p.asm.mov(rbx, access.sum())?;
        load(&mut p.asm, width)?;
        p.expect(rax, rbx, &format!("the sum in {what}"))?;
    }
    p.pass()?;
    Ok(Payload::kernel("mmio", 1, p.finish()?))
}

/// Stores rbx at rdi.
fn store(a: &mut CodeAssembler, width: u8) -> Result<(), IcedError> {
    match width {
        1 => a.mov(byte_ptr(rdi), bl),
        2 => a.mov(word_ptr(rdi), bx),
        4 => a.mov(dword_ptr(rdi), ebx),
        _ => a.mov(qword_ptr(rdi), rbx),
    }
}

/// Loads rax from rdi, zero-extended.
fn load(a: &mut CodeAssembler, width: u8) -> Result<(), IcedError> {
    match width {
        1 => a.movzx(eax, byte_ptr(rdi)),
        2 => a.movzx(eax, word_ptr(rdi)),
        4 => a.mov(eax, dword_ptr(rdi)),
        _ => a.mov(rax, qword_ptr(rdi)),
    }
}

/// Adds rbx to what is at rdi: a read and a write by one instruction.
fn add_in_place(a: &mut CodeAssembler, width: u8) -> Result<(), IcedError> {
    match width {
        1 => a.add(byte_ptr(rdi), bl),
        2 => a.add(word_ptr(rdi), bx),
        4 => a.add(dword_ptr(rdi), ebx),
        _ => a.add(qword_ptr(rdi), rbx),
    }
}
