//! String I/O at 64-bit CPL0, longer than a page and across its end.
//!
//! | touches | how |
//! | --- | --- |
//! | [`ports::DEBUG_CONSOLE`] | `rep outsb` of [`text`], forwards |
//! | [`ports::ECHO`] | `rep ins` of 1, 2, 4 bytes, `rep outs` of 1, 2, 4 bytes; backwards once |
//! | RAM at [`BUFFER`] | source and destination of the strings |

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::FREE;
use crate::{IcedError, Payload, ports};

/// Where strings come from and go to: 16 bytes before the end of a page.
pub const BUFFER: u32 = FREE + 0xff0;
/// Elements of each string: at 4 bytes more than a page.
pub const COUNT: u32 = 1100;

const VALUE: u32 = 0x0246_8ace;

/// What comes out on the debug console by one string instruction.
pub fn text() -> String {
    (0..100).map(|line| format!("line {line}\n")).collect()
}

/// The payload.
pub fn string_io() -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    let text = text();
    let constant = p.data(text.as_bytes());
    p.asm.mov(esi, constant)?;
    p.asm.mov(ecx, text.len() as u32)?;
    p.asm.mov(edx, u32::from(ports::DEBUG_CONSOLE))?;
    p.asm.rep().outsb()?;
    p.asm.mov(ebx, constant + text.len() as u32)?;
    p.expect(rsi, rbx, "RSI after the text")?;

    for width in [1, 2, 4] {
        read_string(&mut p, width)?;
        write_string(&mut p, width, false)?;
    }
    write_string(&mut p, 4, true)?;
    p.pass()?;
    Ok(Payload::kernel("string-io", 1, p.finish()?))
}

/// A string of what the echo register holds: each element the same.
fn read_string(p: &mut LongMode, width: u32) -> Result<(), IcedError> {
    p.asm.mov(edx, u32::from(ports::ECHO))?;
    p.asm.mov(eax, VALUE)?;
    p.asm.out(dx, eax)?;
    p.asm.mov(edi, BUFFER)?;
    p.asm.mov(dword_ptr(rdi + width * COUNT), 0x5a)?;
    p.asm.mov(ecx, COUNT)?;
    match width {
        1 => p.asm.rep().insb()?,
        2 => p.asm.rep().insw()?,
        _ => p.asm.rep().insd()?,
    }
    p.asm.mov(ebx, BUFFER + width * COUNT)?;
    p.expect(rdi, rbx, &format!("RDI after rep ins of {width} bytes"))?;
    p.asm.mov(eax, dword_ptr(rdi))?;
    p.asm.mov(ebx, 0x5a)?;
    p.expect(rax, rbx, &format!("what follows rep ins of {width} bytes"))?;

    // All elements, by four bytes at once.
    let element = match width {
        1 => (VALUE & 0xff) * 0x0101_0101,
        2 => (VALUE & 0xffff) * 0x0001_0001,
        _ => VALUE,
    };
    let mut next = p.asm.create_label();
    p.asm.mov(edi, BUFFER)?;
    p.asm.mov(ebx, element)?;
    p.asm.set_label(&mut next)?;
    p.asm.mov(eax, dword_ptr(rdi))?;
    p.expect(rax, rbx, &format!("an element of rep ins of {width} bytes"))?;
    p.asm.add(rdi, 4)?;
    p.asm.cmp(edi, BUFFER + width * COUNT)?;
    p.asm.jb(next)
}

/// A string of ascending elements: the echo register keeps the last.
fn write_string(p: &mut LongMode, width: u32, backwards: bool) -> Result<(), IcedError> {
    let mut next = p.asm.create_label();
    p.asm.mov(ecx, COUNT)?;
    p.asm.mov(edi, BUFFER)?;
    p.asm.set_label(&mut next)?;
    match width {
        1 => p.asm.mov(byte_ptr(rdi), cl)?,
        2 => p.asm.mov(word_ptr(rdi), cx)?,
        _ => p.asm.mov(dword_ptr(rdi), ecx)?,
    }
    p.asm.add(edi, width)?;
    p.asm.dec(ecx)?;
    p.asm.jne(next)?;

    let last = BUFFER + width * (COUNT - 1);
    let (from, end) = if backwards { (last, BUFFER - width) } else { (BUFFER, last + width) };
    p.asm.mov(esi, from)?;
    p.asm.mov(ecx, COUNT)?;
    p.asm.mov(edx, u32::from(ports::ECHO))?;
    if backwards {
        p.asm.std()?;
    }
    match width {
        1 => p.asm.rep().outsb()?,
        2 => p.asm.rep().outsw()?,
        _ => p.asm.rep().outsd()?,
    }
    p.asm.cld()?;
    p.asm.mov(ebx, end)?;
    p.expect(rsi, rbx, &format!("RSI after rep outs of {width} bytes"))?;
    p.asm.xor(eax, eax)?;
    match width {
        1 => p.asm.in_(al, dx)?,
        2 => p.asm.in_(ax, dx)?,
        _ => p.asm.in_(eax, dx)?,
    }
    p.asm.mov(ebx, if backwards { COUNT } else { 1 })?;
    p.expect(rax, rbx, &format!("the last element of rep outs of {width} bytes"))
}
