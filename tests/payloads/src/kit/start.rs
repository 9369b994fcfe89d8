//! From how a processor starts to 64-bit mode: 32-bit flat for the first (PVH and multiboot agree on it), real mode at
//! a start-up IPI for the others.

use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction};

use super::layout;
use super::tables::KERNEL_CODE;

/// Both starts, [`layout::START_SIZE`] bytes each; the last six are what the GDT register is loaded from.
pub(super) struct Start {
    /// For [`layout::START`].
    pub(super) first: Vec<u8>,
    /// For [`layout::AP_START`].
    pub(super) other: Vec<u8>,
}

/// Assembles both starts; they end in `first` and `other` (64-bit code).
pub(super) fn assemble(first: u32, other: u32, gdt_length: usize) -> Result<Start, IcedError> {
    let mut table_register = (gdt_length as u16 - 1).to_le_bytes().to_vec();
    table_register.extend(layout::GDT.to_le_bytes());

    let table_register_at = |base: u32| base + layout::START_SIZE - table_register.len() as u32;
    let close = |mut code: Vec<u8>| {
        code.resize(layout::START_SIZE as usize - table_register.len(), 0);
        code.extend(&table_register);
        code
    };

    let mut a = CodeAssembler::new(32)?;
    a.cli()?;
    a.lgdt(fword_ptr(table_register_at(layout::START)))?;
    enter_long_mode(&mut a)?;
    a.jmp_far(KERNEL_CODE, first)?;
    let first_bytes = close(a.assemble(u64::from(layout::START))?);

    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.lgdt(fword_ptr(table_register_at(layout::AP_START)))?;
    enter_long_mode(&mut a)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, KERNEL_CODE, other)?)?;
    let other_bytes = close(a.assemble(u64::from(layout::AP_START))?);

    Ok(Start { first: first_bytes, other: other_bytes })
}

/// Intel SDM volume 3, §10.8.5.
fn enter_long_mode(a: &mut CodeAssembler) -> Result<(), IcedError> {
    const CR4_PAE_OSFXSR_OSXMMEXCPT: i32 = 1 << 5 | 1 << 9 | 1 << 10;
    const EFER: u32 = 0xc000_0080;
    const EFER_LME: i32 = 1 << 8;
    const CR0_PG_PE: u32 = 1 << 31 | 1;
    const CR0_NW_CD: u32 = 1 << 29 | 1 << 30;

    a.mov(eax, cr4)?;
    a.or(eax, CR4_PAE_OSFXSR_OSXMMEXCPT)?;
    a.mov(cr4, eax)?;
    a.mov(eax, layout::PAGE_TABLES)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, EFER_LME)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.and(eax, !CR0_NW_CD)?;
    a.or(eax, CR0_PG_PE)?;
    a.mov(cr0, eax)
}
