//! Port I/O of every width, read and written.
//!
//! | touches | how |
//! | --- | --- |
//! | [`ports::ECHO`] | writes [`VALUE`] by 4 bytes, its bytes by 1 at each offset and its halves by 2; reads each back |
//! | [`ports::DEBUG_CONSOLE`] | reads [`ports::DEBUG_CONSOLE_READS`] |

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::{IcedError, Payload, Privilege, ports};

/// What goes through the register.
pub const VALUE: u32 = 0x8421_7e5a;

/// The payload.
pub fn pio(privilege: Privilege) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    p.enter(privilege)?;
    body(&mut p)?;
    Ok(Payload::kernel(privilege.name("pio", "pio-cpl3"), 1, p.finish()?))
}

fn body(p: &mut LongMode) -> Result<(), IcedError> {
    // Four bytes at once.
    p.asm.mov(edx, u32::from(ports::ECHO))?;
    p.asm.mov(eax, VALUE)?;
    p.asm.out(dx, eax)?;
    p.asm.xor(eax, eax)?;
    p.asm.in_(eax, dx)?;
    p.asm.mov(ebx, VALUE)?;
    p.expect(rax, rbx, "4 bytes")?;

    for width in [1, 2] {
        let bits = width * 8;
        let mask = (1u32 << bits) - 1;
        // Complemented part by part: reading all of it then shows each write at its place, and nothing else touched.
        for offset in (0..4).step_by(width) {
            let part = !(VALUE >> (8 * offset)) & mask;
            p.asm.mov(edx, u32::from(ports::ECHO) + offset as u32)?;
            p.asm.mov(eax, part)?;
            match width {
                1 => p.asm.out(dx, al)?,
                _ => p.asm.out(dx, ax)?,
            }
            p.asm.xor(eax, eax)?;
            match width {
                1 => p.asm.in_(al, dx)?,
                _ => p.asm.in_(ax, dx)?,
            }
            p.asm.mov(ebx, part)?;
            p.expect(rax, rbx, &format!("{width} bytes at offset {offset}"))?;
        }
        p.asm.mov(edx, u32::from(ports::ECHO))?;
        p.asm.in_(eax, dx)?;
        p.asm.mov(ebx, !VALUE)?;
        p.expect(rax, rbx, "the whole after its parts")?;
        p.asm.mov(eax, VALUE)?;
        p.asm.out(dx, eax)?;
    }

    p.asm.mov(edx, u32::from(ports::DEBUG_CONSOLE))?;
    p.asm.xor(eax, eax)?;
    p.asm.in_(al, dx)?;
    p.asm.mov(ebx, u32::from(ports::DEBUG_CONSOLE_READS))?;
    p.expect(rax, rbx, "the debug console's read")?;
    p.pass()
}
