//! Assembles a long-mode payload: its own code between the start, the runtime and the tables.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

use super::runtime::Runtime;
use super::tables::{self, FIRST_TSS, KERNEL_DATA, USER_CODE, USER_DATA};
use super::{layout, start};
use crate::image::Kernel;
use crate::{EXIT_FAIL, EXIT_PASS, Privilege};

/// Which instruction the other vCPUs begin with.
const OTHERS_ENTRY: usize = 2;

/// Interprocessor interrupts that start a vCPU (Intel SDM volume 3A §11.6.1).
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600 | layout::AP_START >> 12;

/// One 64-bit payload while it is written. Code goes to `asm`, in this order: the first vCPU's, which begins right
/// after [`LongMode::new`], then whatever else.
///
/// r15d holds the number of the vCPU (its APIC id) when the payload's code begins, and no routine of the kit touches
/// another register, unless it says so.
pub(crate) struct LongMode {
    pub(crate) asm: CodeAssembler,
    runtime: Runtime,
    data: Vec<u8>,
    other_vcpus: CodeLabel,
    has_other_vcpus: bool,
    handlers: Vec<(u8, CodeLabel)>,
}

impl LongMode {
    pub(crate) fn new() -> Result<Self, IcedError> {
        let mut asm = CodeAssembler::new(64)?;
        let mut ready = asm.create_label();
        let mut main = asm.create_label();
        let other_vcpus = asm.create_label();

        // The first vCPU begins with the first instruction, the others with OTHERS_ENTRY.
        asm.xor(r14d, r14d)?;
        asm.jmp(ready)?;
        asm.mov(r14d, 1)?;

        asm.set_label(&mut ready)?;
        asm.mov(eax, u32::from(KERNEL_DATA))?;
        for segment in [ds, es, ss, fs, gs] {
            asm.mov(segment, eax)?;
        }
        asm.mov(eax, apic::ID)?;
        asm.mov(r15d, dword_ptr(rax))?;
        asm.shr(r15d, 24)?;
        asm.mov(eax, r15d)?;
        asm.shl(eax, layout::STACK_SIZE.trailing_zeros())?;
        asm.lea(esp, ptr(rax + tables::stack_top(0)))?;
        asm.mov(eax, layout::DATA)?; // the first constant: what the IDT register is loaded from
        asm.lidt(ptr(rax))?;
        asm.mov(eax, r15d)?;
        asm.shl(eax, 4)?;
        asm.add(eax, u32::from(FIRST_TSS))?;
        // A vCPU that is started again left its TSS busy.
        asm.and(byte_ptr(rax + layout::GDT + 5), !2)?;
        asm.ltr(ax)?;
        asm.test(r14d, r14d)?;
        asm.jne(other_vcpus)?;
        asm.jmp(main)?;

        let runtime = Runtime::emit(&mut asm)?;
        asm.set_label(&mut main)?;
        asm.nop()?;

        let mut data = (256u16 * 16 - 1).to_le_bytes().to_vec();
        data.extend(u64::from(layout::IDT).to_le_bytes());
        Ok(LongMode { asm, runtime, data, other_vcpus, has_other_vcpus: false, handlers: Vec::new() })
    }

    /// Here begins what the other vCPUs do.
    pub(crate) fn other_vcpus(&mut self) -> Result<(), IcedError> {
        self.has_other_vcpus = true;
        self.asm.set_label(&mut self.other_vcpus)?;
        self.asm.nop()
    }

    /// Sets a label where another may follow: an instruction can have one only.
    pub(crate) fn place(&mut self, label: &mut CodeLabel) -> Result<(), IcedError> {
        self.asm.set_label(label)?;
        self.asm.nop()
    }

    /// Keeps constant bytes in the image and tells where.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> u32 {
        while !self.data.len().is_multiple_of(16) {
            self.data.push(0);
        }
        let at = layout::DATA + self.data.len() as u32;
        self.data.extend(bytes);
        at
    }

    /// Writes text to the debug console.
    pub(crate) fn print(&mut self, text: &str) -> Result<(), IcedError> {
        let at = self.data(text.as_bytes());
        self.asm.push(rsi)?;
        self.asm.push(rcx)?;
        self.asm.mov(esi, at)?;
        self.asm.mov(ecx, text.len() as u32)?;
        self.asm.call(self.runtime.put_text)?;
        self.asm.pop(rcx)?;
        self.asm.pop(rsi)
    }

    /// Writes a register as 16 hexadecimal digits to the debug console.
    pub(crate) fn print_hex(&mut self, register: AsmRegister64) -> Result<(), IcedError> {
        self.asm.push(rax)?;
        self.asm.mov(rax, register)?;
        self.asm.call(self.runtime.put_hex)?;
        self.asm.pop(rax)
    }

    /// Ends the payload, well.
    pub(crate) fn pass(&mut self) -> Result<(), IcedError> {
        self.print("pass\n")?;
        self.exit(EXIT_PASS)
    }

    /// Ends the payload with a line of what went wrong.
    pub(crate) fn fail(&mut self, what: &str) -> Result<(), IcedError> {
        self.print(&format!("fail: {what}\n"))?;
        self.exit(EXIT_FAIL)
    }

    /// Fails unless `got` is `wanted`.
    pub(crate) fn expect(&mut self, got: AsmRegister64, wanted: AsmRegister64, what: &str) -> Result<(), IcedError> {
        let mut equal = self.asm.create_label();
        self.asm.cmp(got, wanted)?;
        self.asm.je(equal)?;
        self.print(&format!("fail: {what}: "))?;
        self.print_hex(got)?;
        self.print(" is not ")?;
        self.print_hex(wanted)?;
        self.print("\n")?;
        self.exit(EXIT_FAIL)?;
        self.place(&mut equal)
    }

    /// Takes a spin lock that lies at `address`. Uses rax.
    pub(crate) fn lock(&mut self, address: u32) -> Result<(), IcedError> {
        let mut again = self.asm.create_label();
        let mut taken = self.asm.create_label();
        self.asm.set_label(&mut again)?;
        self.asm.mov(eax, 1)?;
        self.asm.xchg(dword_ptr(address), eax)?;
        self.asm.test(eax, eax)?;
        self.asm.je(taken)?;
        self.asm.pause()?;
        self.asm.jmp(again)?;
        self.place(&mut taken)
    }

    /// Gives the spin lock back.
    pub(crate) fn unlock(&mut self, address: u32) -> Result<(), IcedError> {
        self.asm.mov(dword_ptr(address), 0)
    }

    /// Waits, without stopping the processor, until the word at `address` is at least `value`.
    pub(crate) fn spin_until(&mut self, address: u32, value: u32) -> Result<(), IcedError> {
        let mut again = self.asm.create_label();
        self.asm.set_label(&mut again)?;
        self.asm.pause()?;
        self.asm.cmp(dword_ptr(address), value)?;
        self.asm.jb(again)
    }

    /// Stops the processor for good, interrupts as they are.
    pub(crate) fn halt(&mut self) -> Result<(), IcedError> {
        let mut again = self.asm.create_label();
        self.asm.set_label(&mut again)?;
        self.asm.hlt()?;
        self.asm.jmp(again)
    }

    /// Makes this vCPU take interrupts of its local APIC, and of nothing else: firmware may have left the 8259s and
    /// LINT0 open. Uses rax. STI is the caller's.
    pub(crate) fn enable_apic(&mut self) -> Result<(), IcedError> {
        const MASKED: i32 = 1 << 16;
        self.asm.mov(eax, 0xff)?;
        for mask_register in [0x21, 0xa1] {
            self.asm.out(mask_register, al)?;
        }
        self.asm.mov(eax, apic::LINT0)?;
        self.asm.mov(dword_ptr(rax), MASKED)?;
        self.asm.mov(eax, apic::SPURIOUS)?;
        self.asm.mov(dword_ptr(rax), 0x1ff)
    }

    /// Lets the local APIC's timer interrupt whenever `period` cycles of its clock have passed. Uses rax, rcx.
    pub(crate) fn start_timer(&mut self, vector: u8, period: u32) -> Result<(), IcedError> {
        const PERIODIC: i32 = 1 << 17;
        const UNDIVIDED: i32 = 0b1011;
        self.asm.mov(eax, apic::TIMER)?;
        self.asm.mov(dword_ptr(rax), PERIODIC | i32::from(vector))?;
        self.asm.mov(eax, apic::TIMER_DIVIDE)?;
        self.asm.mov(dword_ptr(rax), UNDIVIDED)?;
        self.asm.mov(ecx, period)?;
        self.asm.mov(eax, apic::TIMER_COUNT)?;
        self.asm.mov(dword_ptr(rax), ecx)
    }

    /// Sleeps until the word at `address`, which an interrupt's handler counts up, is at least `value`. Interrupts are
    /// off afterwards.
    pub(crate) fn sleep_until(&mut self, address: u32, value: AsmRegister32) -> Result<(), IcedError> {
        let mut again = self.asm.create_label();
        let mut done = self.asm.create_label();
        self.asm.set_label(&mut again)?;
        self.asm.cli()?;
        self.asm.cmp(dword_ptr(address), value)?;
        self.asm.jae(done)?;
        // STI takes effect after the next instruction: no interrupt comes between the look and the sleep.
        self.asm.sti()?;
        self.asm.hlt()?;
        self.asm.jmp(again)?;
        self.place(&mut done)
    }

    /// Tells the local APIC that the interrupt is served. Uses rax.
    pub(crate) fn end_of_interrupt(&mut self) -> Result<(), IcedError> {
        self.asm.mov(eax, apic::EOI)?;
        self.asm.mov(dword_ptr(rax), 0)
    }

    /// Sends an interprocessor interrupt: `command` is the low half of the ICR, `target` an APIC id (clobbered).
    /// Uses rax.
    pub(crate) fn send_ipi(&mut self, target: AsmRegister32, command: u32) -> Result<(), IcedError> {
        self.asm.shl(target, 24)?;
        self.asm.mov(eax, apic::COMMAND_HIGH)?;
        self.asm.mov(dword_ptr(rax), target)?;
        self.asm.mov(eax, apic::COMMAND_LOW)?;
        self.asm.mov(dword_ptr(rax), command)
    }

    /// Brings up vCPUs 1 to `vcpus` − 1 by INIT and start-up IPI, and waits until each has come to its code.
    /// They count themselves by [`LongMode::online`]. Enables the local APIC: one that is disabled sends nothing.
    /// Uses rax, rcx, rsi, rdi.
    pub(crate) fn start_other_vcpus(&mut self, vcpus: u8) -> Result<(), IcedError> {
        self.ready_for_others()?;
        let mut next = self.asm.create_label();
        self.asm.mov(ecx, 1)?;
        self.asm.set_label(&mut next)?;
        self.start(ecx)?;
        self.asm.inc(ecx)?;
        self.asm.cmp(ecx, u32::from(vcpus))?;
        self.asm.jb(next)?;
        self.spin_until(layout::ONLINE, u32::from(vcpus) - 1)
    }

    /// Brings up all vCPUs but this one, whatever their APIC ids, and waits until `others` have come to their code. As
    /// [`LongMode::start_other_vcpus`] otherwise.
    pub(crate) fn start_all_other_vcpus(&mut self, others: u32) -> Result<(), IcedError> {
        self.ready_for_others()?;
        self.tell_all_others_to_start()?;
        self.spin_until(layout::ONLINE, others)
    }

    /// Puts the others' start in its place, and enables the local APIC. Uses rax, rcx, rsi, rdi.
    pub(crate) fn ready_for_others(&mut self) -> Result<(), IcedError> {
        self.asm.call(self.runtime.copy_ap_start)?;
        self.enable_apic()
    }

    /// Sends INIT and start-up IPI to all vCPUs but this one. Uses rax, rsi.
    pub(crate) fn tell_all_others_to_start(&mut self) -> Result<(), IcedError> {
        const ALL_BUT_SELF: u32 = 3 << 18;
        for command in [INIT, STARTUP] {
            self.asm.xor(esi, esi)?;
            self.send_ipi(esi, ALL_BUT_SELF | command)?;
        }
        Ok(())
    }

    /// Sends INIT and start-up IPI to the vCPU with this APIC id. Uses rax, rcx, rsi.
    pub(crate) fn start(&mut self, id: AsmRegister32) -> Result<(), IcedError> {
        self.asm.mov(ecx, id)?;
        for command in [INIT, STARTUP] {
            self.asm.mov(esi, ecx)?;
            self.send_ipi(esi, command)?;
        }
        Ok(())
    }

    /// Counts this vCPU among those that came up.
    pub(crate) fn online(&mut self) -> Result<(), IcedError> {
        self.asm.lock().inc(dword_ptr(layout::ONLINE))
    }

    /// Goes on where the payload is meant to run, interrupts off. Uses rax, rcx.
    pub(crate) fn enter(&mut self, privilege: Privilege) -> Result<(), IcedError> {
        const RFLAGS: i32 = 2;
        if privilege == Privilege::Cpl0 {
            return Ok(());
        }
        let mut user = self.asm.create_label();
        self.asm.lea(rcx, ptr(user))?;
        self.asm.mov(rax, rsp)?;
        self.asm.push(i32::from(USER_DATA))?;
        // One stack page serves both: user code begins below the frame that an exception writes at its top.
        self.asm.sub(rax, 0x200)?;
        self.asm.push(rax)?;
        self.asm.push(RFLAGS)?;
        self.asm.push(i32::from(USER_CODE))?;
        self.asm.push(rcx)?;
        self.asm.iretq()?;
        self.place(&mut user)
    }

    /// Writes the handler of an interrupt of the local APIC; `body` keeps every register but rax.
    pub(crate) fn handler(
        &mut self,
        vector: u8,
        body: impl FnOnce(&mut Self) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        let mut entry = self.asm.create_label();
        self.asm.set_label(&mut entry)?;
        self.asm.push(rax)?;
        body(self)?;
        self.end_of_interrupt()?;
        self.asm.pop(rax)?;
        self.asm.iretq()?;
        self.handlers.push((vector, entry));
        Ok(())
    }

    /// Lays the image out.
    pub(crate) fn finish(mut self) -> Result<Kernel, IcedError> {
        if !self.has_other_vcpus {
            self.other_vcpus()?;
            self.halt()?;
        }
        let assembled =
            self.asm.assemble_options(u64::from(layout::CODE), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;

        let mut handlers = [0; 256];
        for (vector, handler) in handlers.iter_mut().enumerate() {
            let label = self.runtime.exceptions.get(vector).unwrap_or(&self.runtime.unexpected);
            *handler = assembled.label_ip(label)?;
        }
        for (vector, label) in &self.handlers {
            handlers[usize::from(*vector)] = assembled.label_ip(label)?;
        }

        let gdt = tables::gdt();
        let other = assembled.inner.new_instruction_offsets[OTHERS_ENTRY];
        let start = start::assemble(layout::CODE, layout::CODE + other, gdt.len())?;

        let mut kernel = Kernel::new(layout::START, layout::START, layout::FREE);
        kernel.place(layout::START, &start.first);
        kernel.place(layout::AP_START_ORIGINAL, &start.other);
        kernel.place(layout::GDT, &gdt);
        kernel.place(layout::IDT, &tables::idt(&handlers));
        kernel.place(layout::TSS, &tables::tss());
        kernel.place(layout::IO_BITMAP, &tables::io_bitmap());
        kernel.place(layout::PAGE_TABLES, &tables::page_tables());
        kernel.place(layout::CODE, &assembled.inner.code_buffer);
        kernel.place(layout::DATA, &self.data);
        Ok(kernel)
    }

    fn exit(&mut self, code: u8) -> Result<(), IcedError> {
        self.asm.mov(eax, u32::from(code))?;
        self.asm.jmp(self.runtime.exit)
    }
}

/// Registers of the local APIC (Intel SDM volume 3, §11.4.1).
pub(super) mod apic {
    const BASE: u32 = 0xfee0_0000;
    pub(crate) const ID: u32 = BASE + 0x20;
    pub(crate) const EOI: u32 = BASE + 0xb0;
    pub(crate) const SPURIOUS: u32 = BASE + 0xf0;
    pub(crate) const TIMER: u32 = BASE + 0x320;
    pub(crate) const LINT0: u32 = BASE + 0x350;
    pub(crate) const TIMER_COUNT: u32 = BASE + 0x380;
    pub(crate) const TIMER_DIVIDE: u32 = BASE + 0x3e0;
    pub(crate) const COMMAND_LOW: u32 = BASE + 0x300;
    pub(crate) const COMMAND_HIGH: u32 = BASE + 0x310;
}
