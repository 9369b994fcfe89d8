//! What a payload says by the serial port at 0x3f8, polled.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::LongMode;

/// The port's data.
pub(crate) const DATA: u32 = 0x3f8;
/// Its line status.
pub(crate) const LINE_STATUS: u32 = 0x3fd;
const ROOM: i32 = 1 << 5;

/// Routines that write to the serial port.
pub(crate) struct Speech {
    /// ecx bytes from rsi.
    text: CodeLabel,
    /// rax as 16 digits.
    hex: CodeLabel,
    /// al. Keeps every register.
    byte: CodeLabel,
}

impl Speech {
    /// Routines that [`Speech::emit`] will place.
    pub(crate) fn new(p: &mut LongMode) -> Self {
        let [text, hex, byte] = [0; 3].map(|_| p.asm.create_label());
        Self { text, hex, byte }
    }

    /// Says text. Uses rsi, rcx.
    pub(crate) fn say(&self, p: &mut LongMode, text: &str) -> Result<(), IcedError> {
        let at = p.data(text.as_bytes());
        p.asm.mov(esi, at)?;
        p.asm.mov(ecx, text.len() as u32)?;
        p.asm.call(self.text)
    }

    /// Says a line: a word, and a number as 16 hexadecimal digits. Uses rax, rsi, rcx.
    pub(crate) fn say_number(&self, p: &mut LongMode, word: &str, number: AsmRegister64) -> Result<(), IcedError> {
        self.say(p, word)?;
        p.asm.mov(rax, number)?;
        p.asm.call(self.hex)?;
        self.say(p, "\r\n")
    }

    /// Places the routines.
    pub(crate) fn emit(&mut self, p: &mut LongMode) -> Result<(), IcedError> {
        let [mut next, mut digit, mut decimal, mut full] = [0; 4].map(|_| p.asm.create_label());
        p.place(&mut self.text)?;
        p.asm.set_label(&mut next)?;
        p.asm.mov(al, byte_ptr(rsi))?;
        p.asm.call(self.byte)?;
        p.asm.inc(rsi)?;
        p.asm.dec(ecx)?;
        p.asm.jne(next)?;
        p.asm.ret()?;

        p.place(&mut self.hex)?;
        p.asm.mov(rsi, rax)?;
        p.asm.mov(ecx, 16)?;
        p.asm.set_label(&mut digit)?;
        p.asm.rol(rsi, 4)?;
        p.asm.mov(eax, esi)?;
        p.asm.and(eax, 0xf)?;
        p.asm.add(eax, i32::from(b'0'))?;
        p.asm.cmp(eax, i32::from(b'9'))?;
        p.asm.jbe(decimal)?;
        p.asm.add(eax, i32::from(b'a' - b'9' - 1))?;
        p.asm.set_label(&mut decimal)?;
        p.asm.call(self.byte)?;
        p.asm.dec(ecx)?;
        p.asm.jne(digit)?;
        p.asm.ret()?;

        p.place(&mut self.byte)?;
        p.asm.push(rdx)?;
        p.asm.push(rax)?;
        p.asm.mov(edx, LINE_STATUS)?;
        p.asm.set_label(&mut full)?;
        p.asm.in_(al, dx)?;
        p.asm.test(al, ROOM)?;
        p.asm.je(full)?;
        p.asm.pop(rax)?;
        p.asm.mov(edx, DATA)?;
        p.asm.out(dx, al)?;
        p.asm.pop(rdx)?;
        p.asm.ret()
    }
}
