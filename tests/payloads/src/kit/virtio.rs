//! A virtio device on PCI as a payload drives it: found, negotiated, split queues (virtio 1.2 §3.1, §4.1, §2.7).

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::LongMode;
use super::layout::{self, FREE};

/// Entries of a queue.
pub(crate) const QUEUE_SIZE: u32 = 128;
/// The first byte that the kit leaves alone.
pub(crate) const BEHIND: u32 = FREE + 0x1000;

/// Maps the gigabyte where the device's registers are, if that is above 4 GiB.
const DIRECTORY: u32 = FREE;
/// Shared words: where the common configuration, the notifications and the MSI-X table are.
const COMMON: u32 = layout::word(8);
const NOTIFY: u32 = layout::word(9);
const TABLE: u32 = layout::word(10);
/// Bytes from one notification offset to the next; the MSI-X capability.
const MULTIPLIER: u32 = layout::word(11);
const MSIX: u32 = layout::word(12);
/// Where the device's own configuration is.
pub(crate) const DEVICE: u32 = layout::word(13);

/// What a payload wants of a device.
pub(crate) struct Wanted<'a> {
    /// Device type (§5).
    pub(crate) kind: u32,
    /// Features that the driver accepts; all of them are offered.
    pub(crate) features: u64,
    /// The queues that it uses: at most three.
    pub(crate) queues: &'a [QueueAt],
    /// The interrupt of all of them; none: it polls.
    pub(crate) vector: Option<u8>,
}

/// A queue, and the first byte of its memory.
#[derive(Clone, Copy)]
pub(crate) struct QueueAt {
    /// Its number.
    pub(crate) number: u32,
    /// Where its parts are, 4 KiB each.
    pub(crate) at: u32,
}

impl QueueAt {
    /// Bytes of its parts.
    pub(crate) const SIZE: u32 = 0x3000;

    /// Descriptors.
    pub(crate) const fn descriptors(self) -> u32 {
        self.at
    }

    /// What the driver makes available.
    pub(crate) const fn available(self) -> u32 {
        self.at + 0x1000
    }

    /// What the device has used.
    pub(crate) const fn used(self) -> u32 {
        self.at + 0x2000
    }
}

impl LongMode {
    /// Finds the device, sets the queues up, and says DRIVER_OK. Then r13, r14 and r11 are where kicks of the first, second and third go.
    /// Uses every register but r15.
    pub(crate) fn start_virtio(&mut self, wanted: &Wanted<'_>) -> Result<(), IcedError> {
        self.find_function(0x1040_1af4 + (wanted.kind << 16))?;
        self.find_structures(wanted.vector.is_some())?;
        self.map_registers()?;
        if let Some(vector) = wanted.vector {
            self.enable_msix(vector)?;
        }
        self.negotiate(wanted)
    }

    /// rax = the time-stamp counter. Uses rdx.
    pub(crate) fn read_clock(&mut self) -> Result<(), IcedError> {
        self.asm.rdtsc()?;
        self.asm.shl(rdx, 32)?;
        self.asm.or(rax, rdx)
    }

    /// eax = configuration word `offset` of the function in r8d. Uses rdx.
    fn pci_read(&mut self, offset: u32) -> Result<(), IcedError> {
        self.asm.mov(ecx, offset)?;
        self.pci_read_at_ecx()
    }

    fn pci_read_at_ecx(&mut self) -> Result<(), IcedError> {
        self.asm.lea(eax, ptr(r8 + rcx))?;
        self.asm.mov(edx, 0xcf8)?;
        self.asm.out(dx, eax)?;
        self.asm.mov(edx, 0xcfc)?;
        self.asm.in_(eax, dx)
    }

    /// Writes ebp to the configuration word at ecx of the function in r8d. Uses rax, rdx.
    fn pci_write_at_ecx(&mut self) -> Result<(), IcedError> {
        self.asm.lea(eax, ptr(r8 + rcx))?;
        self.asm.mov(edx, 0xcf8)?;
        self.asm.out(dx, eax)?;
        self.asm.mov(edx, 0xcfc)?;
        self.asm.mov(eax, ebp)?;
        self.asm.out(dx, eax)
    }

    /// r8d = the configuration address of the first function 0 with this identity, on any of 32 buses.
    fn find_function(&mut self, identity: u32) -> Result<(), IcedError> {
        const ENABLE: u32 = 1 << 31;
        const SLOT: i32 = 1 << 11;
        let [mut next, mut found] = [0; 2].map(|_| self.asm.create_label());
        self.asm.mov(r8d, ENABLE)?;
        self.asm.set_label(&mut next)?;
        self.pci_read(0)?;
        self.asm.cmp(eax, identity)?;
        self.asm.je(found)?;
        self.asm.add(r8d, SLOT)?;
        self.asm.cmp(r8d, ENABLE | 32 << 16)?;
        self.asm.jb(next)?;
        self.fail("there is no such virtio device")?;
        self.place(&mut found)?;
        // Memory and DMA.
        self.asm.mov(ecx, 4)?;
        self.asm.mov(ebp, 6)?;
        self.pci_write_at_ecx()
    }

    /// Walks the capabilities and keeps where the structures are.
    fn find_structures(&mut self, msix: bool) -> Result<(), IcedError> {
        let labels = [0; 10].map(|_| self.asm.create_label());
        let [mut walk, mut next, mut vendor, mut notify, mut own, mut table, mut address, mut low, mut done, mut begin] =
            labels;
        self.asm.jmp(begin)?;

        // rax = the address of offset r11 in BAR eax.
        self.asm.set_label(&mut address)?;
        self.asm.lea(ecx, ptr(rax * 4 + 0x10))?;
        self.pci_read_at_ecx()?;
        self.asm.mov(r10d, eax)?;
        self.asm.and(r10d, !0xfi32)?;
        self.asm.and(eax, 6)?;
        self.asm.cmp(eax, 4)?;
        self.asm.jne(low)?;
        self.asm.add(ecx, 4)?;
        self.pci_read_at_ecx()?;
        self.asm.shl(rax, 32)?;
        self.asm.or(r10, rax)?;
        self.asm.set_label(&mut low)?;
        self.asm.lea(rax, ptr(r10 + r11))?;
        self.asm.ret()?;

        self.asm.set_label(&mut begin)?;
        self.pci_read(0x34)?;
        self.asm.mov(ebx, eax)?;
        self.asm.and(ebx, 0xfc)?;
        self.asm.set_label(&mut walk)?;
        self.asm.test(ebx, ebx)?;
        self.asm.je(done)?;
        self.asm.mov(ecx, ebx)?;
        self.pci_read_at_ecx()?;
        self.asm.mov(r9d, eax)?;
        self.asm.cmp(al, 9)?;
        self.asm.je(vendor)?;
        if msix {
            self.asm.cmp(al, 0x11)?;
            self.asm.je(table)?;
        }
        self.asm.set_label(&mut next)?;
        self.asm.mov(ebx, r9d)?;
        self.asm.shr(ebx, 8)?;
        self.asm.and(ebx, 0xfc)?;
        self.asm.jmp(walk)?;

        // A structure of virtio's own (§4.1.4): common configuration 1, notifications 2, interrupt status 3, the device's own 4.
        self.asm.set_label(&mut vendor)?;
        self.asm.mov(eax, r9d)?;
        self.asm.shr(eax, 24)?;
        self.asm.cmp(eax, 4)?;
        self.asm.ja(next)?;
        self.asm.lea(ecx, ptr(rbx + 8))?;
        self.pci_read_at_ecx()?;
        self.asm.mov(r11d, eax)?;
        self.asm.lea(ecx, ptr(rbx + 4))?;
        self.pci_read_at_ecx()?;
        self.asm.and(eax, 0xff)?;
        self.asm.call(address)?;
        self.asm.mov(ecx, r9d)?;
        self.asm.shr(ecx, 24)?;
        self.asm.cmp(ecx, 2)?;
        self.asm.je(notify)?;
        self.asm.cmp(ecx, 3)?;
        self.asm.je(next)?;
        self.asm.ja(own)?;
        self.asm.mov(qword_ptr(COMMON), rax)?;
        self.asm.jmp(next)?;
        self.asm.set_label(&mut own)?;
        self.asm.mov(qword_ptr(DEVICE), rax)?;
        self.asm.jmp(next)?;
        self.asm.set_label(&mut notify)?;
        self.asm.mov(qword_ptr(NOTIFY), rax)?;
        self.asm.lea(ecx, ptr(rbx + 16))?;
        self.pci_read_at_ecx()?;
        self.asm.mov(dword_ptr(MULTIPLIER), eax)?;
        self.asm.jmp(next)?;

        self.asm.set_label(&mut table)?;
        self.asm.mov(dword_ptr(MSIX), ebx)?;
        self.asm.lea(ecx, ptr(rbx + 4))?;
        self.pci_read_at_ecx()?;
        self.asm.mov(r11d, eax)?;
        self.asm.and(r11d, !7i32)?;
        self.asm.and(eax, 7)?;
        self.asm.call(address)?;
        self.asm.mov(qword_ptr(TABLE), rax)?;
        self.asm.jmp(next)?;
        self.place(&mut done)
    }

    fn map_registers(&mut self) -> Result<(), IcedError> {
        const PRESENT_WRITABLE_USER_ACCESSED: u32 = 0x27;
        const DIRTY_LARGE: u32 = 0xc0;
        let [mut page, mut mapped] = [0; 2].map(|_| self.asm.create_label());
        self.asm.mov(rcx, qword_ptr(COMMON))?;
        self.asm.shr(rcx, 30)?;
        self.asm.cmp(ecx, 4)?;
        self.asm.jb(mapped)?;
        self.asm.mov(rdx, rcx)?;
        self.asm.shl(rdx, 30)?;
        self.asm.or(rdx, (PRESENT_WRITABLE_USER_ACCESSED | DIRTY_LARGE) as i32)?;
        self.asm.mov(edi, DIRECTORY)?;
        self.asm.mov(esi, 512)?;
        self.asm.set_label(&mut page)?;
        self.asm.mov(qword_ptr(rdi), rdx)?;
        self.asm.add(rdi, 8)?;
        self.asm.add(rdx, 1 << 21)?;
        self.asm.dec(esi)?;
        self.asm.jne(page)?;
        self.asm.mov(edx, DIRECTORY | PRESENT_WRITABLE_USER_ACCESSED)?;
        self.asm.mov(qword_ptr(rcx * 8 + (layout::PAGE_TABLES + 4096)), rdx)?;
        self.place(&mut mapped)
    }

    /// MSI-X: vector 0 of the function is `vector` of the first vCPU.
    fn enable_msix(&mut self, vector: u8) -> Result<(), IcedError> {
        self.asm.mov(rdi, qword_ptr(TABLE))?;
        for (offset, word) in [(0, 0xfee0_0000), (4, 0), (8, u32::from(vector)), (12, 0)] {
            self.asm.mov(eax, word)?;
            self.asm.mov(dword_ptr(rdi + offset), eax)?;
        }
        self.asm.mov(ecx, dword_ptr(MSIX))?;
        self.pci_read_at_ecx()?;
        self.asm.mov(ebp, eax)?;
        self.asm.or(ebp, i32::MIN)?;
        self.pci_write_at_ecx()
    }

    /// Status, features, queues (§3.1.1, §4.1.4.3).
    fn negotiate(&mut self, wanted: &Wanted<'_>) -> Result<(), IcedError> {
        const STATUS: u32 = 20;
        const VERSION_1: u64 = 1 << 32;
        let mut agreed = self.asm.create_label();
        self.asm.mov(r12, qword_ptr(COMMON))?;
        for status in [0, 1, 3] {
            self.set(STATUS, 1, status)?;
        }
        let features = wanted.features | VERSION_1;
        for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(8, 4, select)?;
            self.set(12, 4, word)?;
        }
        self.set(STATUS, 1, 11)?;
        self.asm.mov(al, byte_ptr(r12 + STATUS))?;
        self.asm.test(al, 8)?;
        self.asm.jne(agreed)?;
        self.fail("the device doesn't agree to the features")?;
        self.place(&mut agreed)?;
        for (queue, kicks) in wanted.queues.iter().zip([r13, r14, r11]) {
            self.set_up(*queue, kicks, wanted.vector.is_some())?;
        }
        self.set(STATUS, 1, 15)
    }

    /// Sets a queue up; `kicks` is then where its kicks go.
    fn set_up(&mut self, queue: QueueAt, kicks: AsmRegister64, interrupts: bool) -> Result<(), IcedError> {
        const NO_VECTOR: u32 = 0xffff;
        let mut roomy = self.asm.create_label();
        self.set(22, 2, queue.number)?;
        self.asm.mov(ax, word_ptr(r12 + 24))?;
        self.asm.cmp(ax, QUEUE_SIZE as i32)?;
        self.asm.jae(roomy)?;
        self.fail("a queue is too small")?;
        self.place(&mut roomy)?;
        // A reset leaves memory as it was.
        for index in [queue.available(), queue.used()] {
            self.asm.mov(dword_ptr(index), 0)?;
        }
        self.set(24, 2, QUEUE_SIZE)?;
        self.set(26, 2, if interrupts { 0 } else { NO_VECTOR })?;
        for (offset, part) in [(32, queue.descriptors()), (40, queue.available()), (48, queue.used())] {
            self.set(offset, 4, part)?;
            self.set(offset + 4, 4, 0)?;
        }
        self.asm.mov(ax, word_ptr(r12 + 30))?;
        self.asm.movzx(eax, ax)?;
        self.asm.imul_2(eax, dword_ptr(MULTIPLIER))?;
        self.asm.mov(kicks, qword_ptr(NOTIFY))?;
        self.asm.add(kicks, rax)?;
        self.set(28, 2, 1)
    }

    /// Writes a register of the common configuration at r12. Uses rax.
    fn set(&mut self, offset: u32, len: u32, value: u32) -> Result<(), IcedError> {
        self.asm.mov(eax, value)?;
        match len {
            1 => self.asm.mov(byte_ptr(r12 + offset), al),
            2 => self.asm.mov(word_ptr(r12 + offset), ax),
            _ => self.asm.mov(dword_ptr(r12 + offset), eax),
        }
    }
}
