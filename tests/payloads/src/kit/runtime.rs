//! Routines that every long-mode payload carries: the debug console, exceptions, the end.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::layout;
use crate::{EXIT_FAIL, ports};

/// Where the routines begin.
pub(super) struct Runtime {
    /// Writes ecx bytes from rsi to the debug console. Keeps every register but rsi, rcx.
    pub(super) put_text: CodeLabel,
    /// Writes rax as 16 digits. Keeps every register but rax.
    pub(super) put_hex: CodeLabel,
    /// Writes al to the debug-exit port and halts.
    pub(super) exit: CodeLabel,
    /// Brings the other vCPUs' start below 1 MiB. Uses rcx, rsi, rdi.
    pub(super) copy_ap_start: CodeLabel,
    /// Entries of the 32 exceptions.
    pub(super) exceptions: Vec<CodeLabel>,
    /// Entry of interrupts that no payload asked for.
    pub(super) unexpected: CodeLabel,
}

impl Runtime {
    pub(super) fn emit(a: &mut CodeAssembler) -> Result<Self, IcedError> {
        let put_text = emit_put_text(a)?;
        let put_hex = emit_put_hex(a)?;
        let exit = emit_exit(a)?;
        let copy_ap_start = emit_copy_ap_start(a)?;
        let (exceptions, unexpected) = emit_exceptions(a, put_text, put_hex, exit)?;
        Ok(Runtime { put_text, put_hex, exit, copy_ap_start, exceptions, unexpected })
    }
}

fn emit_put_text(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut entry = a.create_label();
    let mut next = a.create_label();
    a.set_label(&mut entry)?;
    a.push(rax)?;
    a.push(rdx)?;
    a.mov(edx, u32::from(ports::DEBUG_CONSOLE))?;
    a.set_label(&mut next)?;
    a.mov(al, byte_ptr(rsi))?;
    a.out(dx, al)?;
    a.inc(rsi)?;
    a.dec(ecx)?;
    a.jne(next)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.ret()?;
    Ok(entry)
}

fn emit_put_hex(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut entry = a.create_label();
    let mut next = a.create_label();
    let mut digit = a.create_label();
    a.set_label(&mut entry)?;
    a.push(rcx)?;
    a.push(rdx)?;
    a.push(rsi)?;
    a.mov(rsi, rax)?;
    a.mov(ecx, 16)?;
    a.mov(edx, u32::from(ports::DEBUG_CONSOLE))?;
    a.set_label(&mut next)?;
    a.rol(rsi, 4)?;
    a.mov(eax, esi)?;
    a.and(eax, 0xf)?;
    a.add(eax, i32::from(b'0'))?;
    a.cmp(eax, i32::from(b'9'))?;
    a.jbe(digit)?;
    a.add(eax, i32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut digit)?;
    a.out(dx, al)?;
    a.dec(ecx)?;
    a.jne(next)?;
    a.pop(rsi)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.ret()?;
    Ok(entry)
}

fn emit_exit(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut entry = a.create_label();
    let mut again = a.create_label();
    a.set_label(&mut entry)?;
    a.mov(edx, u32::from(ports::DEBUG_EXIT))?;
    a.out(dx, al)?;
    // Whoever runs it without the port: no more than a loop that yields.
    a.set_label(&mut again)?;
    a.pause()?;
    a.jmp(again)?;
    Ok(entry)
}

fn emit_copy_ap_start(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut entry = a.create_label();
    a.set_label(&mut entry)?;
    a.mov(esi, layout::AP_START_ORIGINAL)?;
    a.mov(edi, layout::AP_START)?;
    a.mov(ecx, layout::START_SIZE / 8)?;
    a.rep().movsq()?;
    a.ret()?;
    Ok(entry)
}

/// An exception is the end of every payload: one line with vector, error code, RIP and CR2.
fn emit_exceptions(
    a: &mut CodeAssembler,
    put_text: CodeLabel,
    put_hex: CodeLabel,
    exit: CodeLabel,
) -> Result<(Vec<CodeLabel>, CodeLabel), IcedError> {
    const WITH_ERROR_CODE: [usize; 9] = [8, 10, 11, 12, 13, 14, 17, 21, 29];
    const TEXT: &[u8] = b"fail: exception";
    let mut report = a.create_label();
    let mut text = a.create_label();
    let mut space = a.create_label();

    let mut entries = Vec::new();
    for vector in 0..32usize {
        let mut entry = a.create_label();
        a.set_label(&mut entry)?;
        if !WITH_ERROR_CODE.contains(&vector) {
            a.push(0)?;
        }
        a.push(vector as i32)?;
        a.jmp(report)?;
        entries.push(entry);
    }
    let mut unexpected = a.create_label();
    a.set_label(&mut unexpected)?;
    a.push(0)?;
    a.push(0xff)?;

    a.set_label(&mut report)?;
    a.lea(rsi, ptr(text))?;
    a.mov(ecx, TEXT.len() as u32)?;
    a.call(put_text)?;
    for field in 0..4 {
        a.lea(rsi, ptr(space))?;
        a.mov(ecx, 1)?;
        a.call(put_text)?;
        match field {
            3 => a.mov(rax, cr2)?,
            _ => a.mov(rax, qword_ptr(rsp + 8 * field))?,
        }
        a.call(put_hex)?;
    }
    a.lea(rsi, ptr(space))?;
    a.inc(rsi)?;
    a.mov(ecx, 1)?;
    a.call(put_text)?;
    a.mov(eax, u32::from(EXIT_FAIL))?;
    a.jmp(exit)?;
    a.set_label(&mut text)?;
    a.db(TEXT)?;
    a.set_label(&mut space)?;
    a.db(b" \n")?;
    Ok((entries, unexpected))
}
