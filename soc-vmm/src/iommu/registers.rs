//! The unit's registers (VT-d specification §11.4), one page of memory.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::event::{Event, EventState};
use super::faults::{Faults, FaultsState, RECORDS, status};
use super::queue::{Descriptor, QueueRegisters};
use super::remap::Remapping;
use super::tables::PAGE_MASK;
use super::{ADDRESS_BITS, Iommu, walk};
use crate::bus::{Access, Answer, Claim, Deferred, Device, Wake};
use crate::devices::{Persist, Ranges, RestoreError};
use crate::interrupt::{MessageSink, Settling, Waiters};
use crate::layout::{IOMMU, PAGE_SIZE};
use crate::persist::check;

// Offsets.
const VERSION: u64 = 0x00;
const CAPABILITY: u64 = 0x08;
const EXTENDED_CAPABILITY: u64 = 0x10;
const COMMAND: u64 = 0x18;
const STATUS: u64 = 0x1c;
const ROOT: u64 = 0x20;
const CONTEXT_COMMAND: u64 = 0x28;
const FAULT_STATUS: u64 = 0x34;
const FAULT_EVENT: u64 = 0x38;
const QUEUE_HEAD: u64 = 0x80;
const QUEUE_TAIL: u64 = 0x88;
const QUEUE_ADDRESS: u64 = 0x90;
const COMPLETION_STATUS: u64 = 0x9c;
const COMPLETION_EVENT: u64 = 0xa0;
const INTERRUPT_TABLE: u64 = 0xb8;
const INVALIDATE_ADDRESS: u64 = 0xf0;
const IOTLB_COMMAND: u64 = 0xf8;
const FAULT_RECORDS: u64 = 0x220;
const FAULT_RECORDS_END: u64 = FAULT_RECORDS + 16 * RECORDS as u64;

/// Version 1.0.
const VERSION_VALUE: u32 = 0x10;
/// 64 Ki domains; 39 and 48 address bits (3 and 4 levels), at most 48; where fault records are, and how many; pages of 2 MiB and 1 GiB;
/// page-selective invalidation of up to 2^18 pages; invalidations drain writes and reads.
const CAPABILITY_VALUE: u64 = 6
    | 0b110 << 8
    | (ADDRESS_BITS as u64 - 1) << 16
    | (FAULT_RECORDS / 16) << 24
    | 0b11 << 34
    | 1 << 39
    | (RECORDS as u64 - 1) << 40
    | 18 << 48
    | 1 << 54
    | 1 << 55;
/// Coherent walks, the queue, interrupt remapping with extended destinations, pass-through, where the IOTLB registers are, any number of
/// interrupt entries at once.
const EXTENDED_VALUE: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | (INVALIDATE_ADDRESS / 16) << 8 | 15 << 20;

// Bits of the global command and status registers.
const TRANSLATE: u32 = 1 << 31;
const SET_ROOT: u32 = 1 << 30;
const QUEUE: u32 = 1 << 26;
const REMAP: u32 = 1 << 25;
const SET_TABLE: u32 = 1 << 24;
const COMPATIBLE: u32 = 1 << 23;
/// What stays on until it is turned off.
const SWITCHES: u32 = TRANSLATE | QUEUE | REMAP | COMPATIBLE;

/// IRTA: destinations have 32 bits.
const EXTENDED: u64 = 1 << 11;
const INTERRUPT_TABLE_BITS: u64 = PAGE_MASK | EXTENDED | 0xf;

/// What is served in one go, before other vCPUs' accesses have their turn: so many descriptors, …
const AT_ONCE: u32 = 256;
/// … of which one that looks at every wired message counts for more.
const COST_OF_ENTRIES: u32 = 64;

/// The unit on the bus.
pub struct VtdRegisters {
    iommu: Arc<Iommu>,
    values: Values,
    completion: Event,
    /// The changes of routes that the queue waits for.
    behind: Option<u64>,
    waiters: Waiters,
    wake: Arc<dyn Wake>,
}

/// Registers that are numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Values {
    status: u32,
    /// The root table: the register, and what is in use.
    root: u64,
    root_used: u64,
    /// The interrupt table, likewise.
    table: u64,
    table_used: u64,
    context_command: u64,
    invalidate_address: u64,
    iotlb_command: u64,
    queue: QueueRegisters,
    /// A wait was completed.
    completed: bool,
}

/// All that a guest can tell of the unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VtdState {
    values: Values,
    completion: EventState,
    faults: FaultsState,
}

impl VtdRegisters {
    /// What the unit claims.
    pub const RANGES: Ranges =
        Ranges { ports: &[], memory: &[Claim { base: IOMMU, len: PAGE_SIZE }], posted_ports: &[], posted_memory: &[] };

    /// The registers of `iommu`. Its own interrupts take a route of `messages`; `settling` says when the host knows routes, and `wake`
    /// makes the bus poll.
    pub fn new(iommu: Arc<Iommu>, messages: &dyn MessageSink, settling: Arc<Settling>, wake: Arc<dyn Wake>) -> Self {
        Self {
            iommu,
            values: Values::default(),
            completion: Event::new(messages.route()),
            behind: None,
            waiters: Waiters::new(settling),
            wake,
        }
    }

    /// The 4 bytes at `offset`, a multiple of 4.
    fn word(&self, offset: u64) -> u32 {
        let Values {
            status, root, table, context_command, invalidate_address, iotlb_command, queue, completed, ..
        } = self.values;
        let half = |value: u64| (value >> (8 * (offset & 4))) as u32;
        match offset & !7 {
            VERSION if offset == VERSION => VERSION_VALUE,
            CAPABILITY => half(CAPABILITY_VALUE),
            EXTENDED_CAPABILITY => half(EXTENDED_VALUE),
            COMMAND if offset == STATUS => status,
            ROOT => half(root),
            CONTEXT_COMMAND => half(context_command),
            0x30 if offset == FAULT_STATUS => self.iommu.faults().status(),
            FAULT_EVENT | 0x40 => self.iommu.faults().event_word((offset - FAULT_EVENT) / 4),
            QUEUE_HEAD => half(u64::from(queue.head) << 4),
            QUEUE_TAIL => half(u64::from(queue.tail) << 4),
            QUEUE_ADDRESS => half(queue.address),
            0x98 if offset == COMPLETION_STATUS => completed.into(),
            COMPLETION_EVENT | 0xa8 => self.completion.read((offset - COMPLETION_EVENT) / 4),
            INTERRUPT_TABLE => half(table),
            INVALIDATE_ADDRESS => half(invalidate_address),
            IOTLB_COMMAND => half(iotlb_command),
            FAULT_RECORDS..FAULT_RECORDS_END => {
                self.iommu.faults().record_word(((offset - FAULT_RECORDS) / 4) as usize)
            }
            _ => 0,
        }
    }

    /// Writes the 4 bytes at `offset`, a multiple of 4.
    fn write_word(&mut self, offset: u64, value: u32) {
        let values = &mut self.values;
        let shift = 8 * (offset & 4);
        let merge = |old: u64| old & !(0xffff_ffff << shift) | u64::from(value) << shift;
        match offset & !7 {
            COMMAND if offset == COMMAND => self.command(value),
            ROOT => values.root = merge(values.root) & PAGE_MASK,
            CONTEXT_COMMAND => {
                values.context_command = merge(values.context_command);
                let done = self.invalidate(self.values.context_command, 61);
                self.values.context_command = done;
            }
            0x30 if offset == FAULT_STATUS => {
                self.iommu.faults().clear(value);
                // What stood goes on where it was.
                self.serve();
            }
            FAULT_EVENT | 0x40 => self.iommu.faults().event().write((offset - FAULT_EVENT) / 4, value),
            QUEUE_TAIL if offset == QUEUE_TAIL => {
                values.queue.tail = value >> 4 & 0x7fff;
                self.serve();
            }
            QUEUE_ADDRESS if values.status & QUEUE == 0 => {
                values.queue.address = merge(values.queue.address) & QueueRegisters::ADDRESS;
            }
            0x98 if offset == COMPLETION_STATUS && value & 1 != 0 => {
                values.completed = false;
                self.completion.withdraw();
            }
            COMPLETION_EVENT | 0xa8 => self.completion.write((offset - COMPLETION_EVENT) / 4, value),
            INTERRUPT_TABLE => values.table = merge(values.table) & INTERRUPT_TABLE_BITS,
            INVALIDATE_ADDRESS => values.invalidate_address = merge(values.invalidate_address),
            IOTLB_COMMAND => {
                values.iotlb_command = merge(values.iotlb_command);
                let done = self.invalidate(self.values.iotlb_command, 60);
                self.values.iotlb_command = done;
            }
            FAULT_RECORDS..FAULT_RECORDS_END => {
                let index = ((offset - FAULT_RECORDS) / 4) as usize;
                self.iommu.faults().write_record_word(index, value);
            }
            _ => {}
        }
    }

    /// The global command register: what is not a switch is done once, and shown as done ever after.
    fn command(&mut self, value: u32) {
        let before = self.values.status;
        let changed = (before ^ value) & SWITCHES;
        self.values.status = before & !SWITCHES | value & (SWITCHES | SET_ROOT | SET_TABLE);
        if value & SET_ROOT != 0 {
            self.values.root_used = self.values.root;
        }
        if value & SET_TABLE != 0 {
            self.values.table_used = self.values.table;
        }
        if value & SET_ROOT != 0 || changed & TRANSLATE != 0 {
            self.translate();
        }
        if value & SET_TABLE != 0 || changed & (REMAP | COMPATIBLE) != 0 {
            self.remap();
        }
        if changed & QUEUE != 0 {
            self.values.queue.head = 0;
            self.behind = None;
            self.serve();
        }
    }

    fn translate(&self) {
        let Values { status, root_used, .. } = self.values;
        self.iommu.translation_mut().set((status & TRANSLATE != 0).then_some(root_used));
    }

    fn remap(&self) {
        let Values { status, table_used, .. } = self.values;
        self.iommu.set_remapping(Remapping {
            enabled: status & REMAP != 0,
            compatible: status & COMPATIBLE != 0,
            table: table_used & PAGE_MASK,
            entries: 2 << (table_used & 0xf),
            extended: table_used & EXTENDED != 0,
        });
        self.iommu.invalidate_entries(|_| true);
    }

    /// An invalidation by register: bit 63 asks for it, the two bits from `granularity` on say how fine, and two bits lower is said
    /// how fine it was done. What the register is afterwards.
    fn invalidate(&self, command: u64, granularity: u32) -> u64 {
        const GO: u64 = 1 << 63;
        if command & GO == 0 {
            return command;
        }
        let wanted = command >> granularity & 3;
        if wanted != 0 {
            self.iommu.translation_mut().forget();
        }
        // IOTLB: 61:60 and 58:57; contexts: 62:61 and 60:59.
        let done = if granularity == 60 { 57 } else { 59 };
        command & !(GO | 3 << done) | wanted << done
    }

    /// Serves the queue, as far as it can be now.
    fn serve(&mut self) {
        let mut left = AT_ONCE;
        while left > 0 {
            if self.values.status & QUEUE == 0 || self.iommu.faults().status() & status::QUEUE != 0 {
                return;
            }
            // Nothing may go by an old route any more when the guest hears that it is gone.
            if self.behind.is_some_and(|mark| !self.waiters.is_past(mark)) {
                return;
            }
            self.behind = None;
            let next = match self.values.queue.next() {
                Ok(None) => return,
                Ok(Some(at)) => walk::entry(&*self.iommu.memory, at, 0).and_then(Descriptor::parse),
                Err(_) => None,
            };
            let Some(cost) = next.and_then(|descriptor| self.perform(descriptor)) else {
                return self.iommu.faults().queue_stands();
            };
            self.values.queue.advance();
            left = left.saturating_sub(cost);
        }
        self.wake.wake();
    }

    /// Does what a descriptor asks for; what it cost. None: it can't be done.
    fn perform(&mut self, descriptor: Descriptor) -> Option<u32> {
        match descriptor {
            Descriptor::Translations => self.iommu.translation_mut().forget(),
            Descriptor::AllEntries | Descriptor::Entries { .. } => {
                self.iommu.invalidate_entries(|index| descriptor.is_meant(index));
                self.behind = Some(self.waiters.mark());
                return Some(COST_OF_ENTRIES);
            }
            Descriptor::Wait { status, interrupt } => {
                if let Some((at, value)) = status {
                    self.iommu.memory.write(at, &value.to_le_bytes()).ok()?;
                }
                if interrupt && !std::mem::replace(&mut self.values.completed, true) {
                    self.completion.fire();
                }
            }
        }
        Some(1)
    }
}

impl Device for VtdRegisters {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        let first = offset & !3;
        let word = |n: u64| u128::from(self.word(first + 4 * n)) << (32 * n);
        // At most 8 bytes, in at most three words.
        let words = (0..3).filter(|n| first + 4 * n < offset + u64::from(access.len)).map(word);
        Answer::Done((words.fold(0, |all, word| all | word) >> (8 * (offset & 3))) as u64)
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer {
        let before = self.waiters.mark();
        match access.len {
            4 if offset.is_multiple_of(4) => self.write_word(offset, data as u32),
            8 if offset.is_multiple_of(8) => {
                self.write_word(offset, data as u32);
                self.write_word(offset + 4, (data >> 32) as u32);
            }
            // Undefined (§11.2).
            _ => {}
        }
        // The queue's own requests are finished when the queue says so.
        if offset == COMMAND { self.waiters.answer(before, reply) } else { Answer::Done(0) }
    }

    fn poll(&mut self) {
        self.waiters.poll();
        self.serve();
    }

    fn reset(&mut self) {
        self.values = Values::default();
        self.behind = None;
        self.completion.reset();
        self.iommu.faults().reset();
        self.translate();
        self.remap();
    }
}

impl Persist for VtdRegisters {
    const NAME: &'static str = "vtd";
    type State = VtdState;

    fn save(&self) -> VtdState {
        let faults = self.iommu.faults().save();
        VtdState { values: self.values.clone(), completion: self.completion.save(), faults }
    }

    fn restore(&mut self, state: &VtdState) -> Result<(), RestoreError> {
        let check = |sound, what| check(sound, "VT-d", what);
        let VtdState { values, completion, faults } = state;
        let Values { status, root, root_used, table, table_used, queue, .. } = values;
        check(Faults::is_sound(faults), "fault records that there are not")?;
        check(status & !(SWITCHES | SET_ROOT | SET_TABLE) == 0, "a status that there is not")?;
        check((root | root_used) & !PAGE_MASK == 0, "a root table that is no page")?;
        check((table | table_used) & !INTERRUPT_TABLE_BITS == 0, "an interrupt table that is no page")?;
        let in_queue = |index: u32| index < QueueRegisters::MOST;
        let queue_fits = queue.address & !QueueRegisters::ADDRESS == 0 && in_queue(queue.head) && in_queue(queue.tail);
        check(queue_fits, "a queue that can't be")?;
        self.values = values.clone();
        self.completion.restore(completion.clone());
        self.iommu.faults().restore(faults);
        self.translate();
        self.remap();
        // What the queue waited for at the source is as true here once the host has every route.
        self.behind = Some(self.waiters.mark());
        Ok(())
    }
}

impl std::fmt::Debug for VtdRegisters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VtdRegisters").field("values", &self.values).finish_non_exhaustive()
    }
}
