//! Port I/O and string I/O in real mode, from the reset vector.
//!
//! | touches | how |
//! | --- | --- |
//! | [`ports::ECHO`] | writes 1, 2 and 4 bytes and reads them back; `rep outs` and `rep ins` of each width |
//! | [`ports::DEBUG_CONSOLE`] | `rep outsb` of [`TEXT`] |
//! | RAM at 0:0x8000 | what `rep ins` brings |

use iced_x86::code_asm::*;

use crate::kit::{RealMode, real};
use crate::{IcedError, Payload, ports};

/// What comes out by string I/O.
pub const TEXT: &str = "a line by rep outsb\n";

const VALUE: u32 = 0x1357_9bdf;
const COUNT: u32 = 40;

/// The payload.
pub fn real_mode() -> Result<Payload, IcedError> {
    let mut p = RealMode::new()?;
    p.asm.mov(dx, u32::from(ports::ECHO))?;
    for (width, wanted) in [(4, VALUE), (2, VALUE & 0xffff), (1, VALUE & 0xff)] {
        p.asm.mov(eax, VALUE)?;
        match width {
            1 => p.asm.out(dx, al)?,
            2 => p.asm.out(dx, ax)?,
            _ => p.asm.out(dx, eax)?,
        }
        p.asm.xor(eax, eax)?;
        match width {
            1 => p.asm.in_(al, dx)?,
            2 => p.asm.in_(ax, dx)?,
            _ => p.asm.in_(eax, dx)?,
        }
        p.expect_eax(wanted, &format!("{width} bytes"))?;
        p.asm.mov(dx, u32::from(ports::ECHO))?;
    }

    // The text is copied to RAM, then goes out.
    for (offset, byte) in (real::FREE..).zip(TEXT.bytes()) {
        p.asm.mov(byte_ptr(offset), u32::from(byte))?;
    }
    p.asm.mov(si, real::FREE)?;
    p.asm.mov(cx, TEXT.len() as u32)?;
    p.asm.mov(dx, u32::from(ports::DEBUG_CONSOLE))?;
    p.asm.rep().outsb()?;

    for width in [1u32, 2, 4] {
        p.asm.mov(dx, u32::from(ports::ECHO))?;
        p.asm.mov(eax, VALUE)?;
        p.asm.out(dx, eax)?;
        p.asm.mov(di, real::FREE)?;
        p.asm.mov(cx, COUNT)?;
        match width {
            1 => p.asm.rep().insb()?,
            2 => p.asm.rep().insw()?,
            _ => p.asm.rep().insd()?,
        }
        p.asm.mov(eax, dword_ptr(real::FREE + COUNT * width - 4))?;
        let wanted = match width {
            1 => (VALUE & 0xff) * 0x0101_0101,
            2 => (VALUE & 0xffff) * 0x0001_0001,
            _ => VALUE,
        };
        p.expect_eax(wanted, &format!("rep ins of {width} bytes"))?;
        p.asm.movzx(eax, di)?;
        p.expect_eax(real::FREE + COUNT * width, &format!("DI after rep ins of {width} bytes"))?;

        // The last of a string is what the register keeps.
        p.asm.mov(dword_ptr(real::FREE + COUNT * width - 4), !VALUE)?;
        p.asm.mov(si, real::FREE)?;
        p.asm.mov(cx, COUNT)?;
        p.asm.mov(dx, u32::from(ports::ECHO))?;
        match width {
            1 => p.asm.rep().outsb()?,
            2 => p.asm.rep().outsw()?,
            _ => p.asm.rep().outsd()?,
        }
        p.asm.xor(eax, eax)?;
        let wanted = match width {
            1 => {
                p.asm.in_(al, dx)?;
                !VALUE >> 24
            }
            2 => {
                p.asm.in_(ax, dx)?;
                !VALUE >> 16
            }
            _ => {
                p.asm.in_(eax, dx)?;
                !VALUE
            }
        };
        p.expect_eax(wanted, &format!("rep outs of {width} bytes"))?;
    }
    p.pass()?;
    Ok(Payload::firmware("real-mode", p.finish()?))
}
