//! Assembles a real-mode payload: a 64 KiB firmware image that begins at the reset vector.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::image::Firmware;
use crate::{EXIT_FAIL, EXIT_PASS, ports};

/// Where the stack of a real-mode payload begins to grow down, and where its free RAM begins.
pub(crate) const STACK_TOP: u32 = 0x7000;
/// First free byte.
pub(crate) const FREE: u32 = 0x8000;

/// One real-mode payload while it is written. DS and ES are 0, SS:SP is 0:[`STACK_TOP`]; constants lie in CS.
pub(crate) struct RealMode {
    pub(crate) asm: CodeAssembler,
    put_text: CodeLabel,
}

impl RealMode {
    pub(crate) fn new() -> Result<Self, IcedError> {
        let mut a = CodeAssembler::new(16)?;
        let mut main = a.create_label();
        a.cli()?;
        a.cld()?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.mov(ss, ax)?;
        a.mov(esp, STACK_TOP)?;
        a.jmp(main)?;
        let put_text = emit_put_text(&mut a)?;
        a.set_label(&mut main)?;
        Ok(RealMode { asm: a, put_text })
    }

    /// Writes text to the debug console.
    pub(crate) fn print(&mut self, text: &str) -> Result<(), IcedError> {
        let a = &mut self.asm;
        let mut over = a.create_label();
        a.push(si)?;
        a.push(cx)?;
        a.call(over)?; // leaves the text's address on the stack
        a.db(text.as_bytes())?;
        a.set_label(&mut over)?;
        a.pop(si)?;
        a.mov(cx, text.len() as u32)?;
        a.call(self.put_text)?;
        a.pop(cx)?;
        a.pop(si)
    }

    /// Fails unless eax is `wanted`. Uses edx.
    pub(crate) fn expect_eax(&mut self, wanted: u32, what: &str) -> Result<(), IcedError> {
        let mut equal = self.asm.create_label();
        self.asm.cmp(eax, wanted)?;
        self.asm.je(equal)?;
        self.print(&format!("fail: {what}\n"))?;
        self.exit(EXIT_FAIL)?;
        self.asm.set_label(&mut equal)?;
        self.asm.nop()
    }

    /// Ends the payload, well.
    pub(crate) fn pass(&mut self) -> Result<(), IcedError> {
        self.print("pass\n")?;
        self.exit(EXIT_PASS)
    }

    /// Lays the image out: code from 0xf0000, the reset vector at its end.
    pub(crate) fn finish(mut self) -> Result<Firmware, IcedError> {
        let code = self.asm.assemble(0)?;
        let mut reset = CodeAssembler::new(16)?;
        reset.jmp_far(Firmware::SEGMENT, 0)?;
        Ok(Firmware::new(&code, &reset.assemble(Firmware::RESET_VECTOR)?))
    }

    fn exit(&mut self, code: u8) -> Result<(), IcedError> {
        let a = &mut self.asm;
        let mut again = a.create_label();
        a.mov(al, u32::from(code))?;
        a.mov(dx, u32::from(ports::DEBUG_EXIT))?;
        a.out(dx, al)?;
        a.set_label(&mut again)?;
        a.pause()?;
        a.jmp(again)
    }
}

/// Writes cx bytes from cs:si to the debug console. Keeps every register but si, cx.
fn emit_put_text(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut entry = a.create_label();
    let mut next = a.create_label();
    a.set_label(&mut entry)?;
    a.push(ax)?;
    a.push(dx)?;
    a.mov(dx, u32::from(ports::DEBUG_CONSOLE))?;
    a.set_label(&mut next)?;
    a.mov(al, byte_ptr(si).cs())?;
    a.out(dx, al)?;
    a.inc(si)?;
    a.dec(cx)?;
    a.jne(next)?;
    a.pop(dx)?;
    a.pop(ax)?;
    a.ret()?;
    Ok(entry)
}
