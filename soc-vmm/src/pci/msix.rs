//! MSI-X (PCI Express Base §7.7.2): a table of messages in a BAR, raised from any thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::config::ConfigSpace;
use crate::interrupt::{Message, MessageRoute, MessageSink};

/// Capability: MSI-X.
pub const CAP_MSIX: u8 = 0x11;
/// Bytes of a table's entry.
const ENTRY: u64 = 16;

/// Message control, in the capability.
const CONTROL: u16 = 2;
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// An entry's vector control.
const MASKED: u32 = 1;

/// Where table and pending bits lie: in one BAR, the table first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Entries, 1–2048.
    pub vectors: u16,
    /// BAR.
    pub bar: u8,
    /// Offset of the table in it, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bits, likewise.
    pub pending: u32,
}

/// A function's MSI-X: the side of its registers.
pub struct Msix {
    capability: u16,
    layout: MsixLayout,
    table: Arc<Table>,
}

/// The side that raises.
#[derive(Clone)]
pub struct MsixVectors(Arc<Table>);

struct Table(Mutex<State>);

struct State {
    enabled: bool,
    mask_all: bool,
    entries: Vec<Entry>,
}

struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    route: Box<dyn MessageRoute>,
    /// What the route has.
    routed: Option<Message>,
}

/// Saved entries: address, data, vector control, pending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState(Vec<(u64, u32, u32, bool)>);

impl Msix {
    /// Adds the capability to `config`. The BAR is the device's to add.
    ///
    /// # Panics
    /// The layout is none: a mistake in a device's table.
    pub fn new(config: &mut ConfigSpace, layout: MsixLayout, sink: &dyn MessageSink) -> Self {
        let MsixLayout { vectors, bar, table, pending } = layout;
        assert!((1..=2048).contains(&vectors) && table.is_multiple_of(8) && pending.is_multiple_of(8) && bar < 6);
        assert!(
            u64::from(pending) >= u64::from(table) + u64::from(vectors) * ENTRY,
            "the table runs into the pending bits"
        );
        let bar = u32::from(bar);
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        body.extend((table | bar).to_le_bytes());
        body.extend((pending | bar).to_le_bytes());
        let capability = config.add_capability(CAP_MSIX, &body, &(ENABLE | MASK_ALL).to_le_bytes());
        let entry =
            || Entry { address: 0, data: 0, control: MASKED, pending: false, route: sink.route(), routed: None };
        let entries = (0..vectors).map(|_| entry()).collect();
        let table = Arc::new(Table(Mutex::new(State { enabled: false, mask_all: false, entries })));
        Self { capability, layout, table }
    }

    /// What raises the vectors.
    pub fn vectors(&self) -> MsixVectors {
        MsixVectors(self.table.clone())
    }

    /// Where everything lies.
    pub fn layout(&self) -> MsixLayout {
        self.layout
    }

    /// Whether `offset` of the BAR is the table's or the pending bits'.
    pub fn claims(&self, offset: u64) -> bool {
        let within = |start: u32, len: u64| (u64::from(start)..u64::from(start) + len).contains(&offset);
        within(self.layout.table, u64::from(self.layout.vectors) * ENTRY)
            || within(self.layout.pending, self.pending_len())
    }

    fn pending_len(&self) -> u64 {
        u64::from(self.layout.vectors).div_ceil(64) * 8
    }

    /// Looks at the capability again, after a write to configuration space.
    pub fn configure(&mut self, config: &ConfigSpace) {
        let control = config.u16(self.capability + CONTROL);
        let mut state = self.table.lock();
        (state.enabled, state.mask_all) = (control & ENABLE != 0, control & MASK_ALL != 0);
        state.settle_all();
    }

    /// Reads `len` bytes, 4 or 8 and aligned, from `offset` of the BAR; other accesses are undefined and give zeros.
    pub fn read(&self, offset: u64, len: u8) -> u64 {
        if !is_legal(offset, len) {
            return 0;
        }
        let state = self.table.lock();
        let word = |offset: u64| u64::from(self.word(&state, offset));
        word(offset) | if len == 8 { word(offset + 4) << 32 } else { 0 }
    }

    fn word(&self, state: &State, offset: u64) -> u32 {
        if let Some(at) = offset.checked_sub(self.layout.pending.into()).filter(|at| *at < self.pending_len()) {
            let first = (at * 8) as usize;
            let bits = state.entries.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |word, (bit, entry)| word | u32::from(entry.pending) << bit);
        }
        let Some(at) = offset.checked_sub(self.layout.table.into()) else { return 0 };
        let Some(entry) = state.entries.get((at / ENTRY) as usize) else { return 0 };
        match at % ENTRY {
            0 => entry.address as u32,
            4 => (entry.address >> 32) as u32,
            8 => entry.data,
            _ => entry.control,
        }
    }

    /// A guest's write there. Pending bits can't be written.
    pub fn write(&mut self, offset: u64, len: u8, data: u64) {
        if !is_legal(offset, len) {
            return;
        }
        let mut state = self.table.lock();
        for (offset, word) in
            [(offset, data as u32), (offset + 4, (data >> 32) as u32)].into_iter().take((len / 4).into())
        {
            let Some(at) = offset.checked_sub(self.layout.table.into()) else { continue };
            let index = (at / ENTRY) as usize;
            let Some(entry) = state.entries.get_mut(index) else { continue };
            match at % ENTRY {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(word),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(word) << 32,
                8 => entry.data = word,
                _ => entry.control = word & MASKED,
            }
            state.settle(index);
        }
    }

    /// As after power on.
    pub fn reset(&mut self) {
        let mut state = self.table.lock();
        (state.enabled, state.mask_all) = (false, false);
        for entry in &mut state.entries {
            (entry.address, entry.data, entry.control, entry.pending) = (0, 0, MASKED, false);
        }
        state.settle_all();
    }

    /// Takes the table. The capability is in the configuration space's state.
    pub fn save(&self) -> MsixState {
        let state = self.table.lock();
        MsixState(state.entries.iter().map(|e| (e.address, e.data, e.control, e.pending)).collect())
    }

    /// Puts it back; whether it has as many entries. The configuration space is restored, then [`Msix::configure`] called.
    #[must_use]
    pub fn restore(&mut self, saved: &MsixState) -> bool {
        let mut state = self.table.lock();
        if saved.0.len() != state.entries.len() {
            return false;
        }
        for (entry, saved) in state.entries.iter_mut().zip(&saved.0) {
            (entry.address, entry.data, entry.control, entry.pending) = (saved.0, saved.1, saved.2 & MASKED, saved.3);
        }
        true
    }
}

/// 4 or 8 bytes, aligned (§6.1.4.2).
fn is_legal(offset: u64, len: u8) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len.into())
}

impl MsixVectors {
    /// Whether the guest uses MSI-X: INTx is not used then.
    pub fn enabled(&self) -> bool {
        self.0.lock().enabled
    }

    /// Raises a vector. One that is masked is raised once it no longer is; one that there isn't, never.
    pub fn raise(&self, vector: u16) {
        let mut state = self.0.lock();
        let (enabled, mask_all) = (state.enabled, state.mask_all);
        let Some(entry) = state.entries.get_mut(usize::from(vector)).filter(|_| enabled) else { return };
        if mask_all || entry.control & MASKED != 0 {
            entry.pending = true;
        } else {
            entry.route.raise();
        }
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn settle_all(&mut self) {
        (0..self.entries.len()).for_each(|index| self.settle(index));
    }

    /// Makes an entry's route what its registers say, and raises what waited for it.
    fn settle(&mut self, index: usize) {
        let entry = &mut self.entries[index];
        let open = self.enabled && !self.mask_all && entry.control & MASKED == 0;
        // A masked entry keeps its route: masking is frequent, and nothing is raised meanwhile.
        let wanted = self.enabled.then_some(Message { address: entry.address, data: entry.data });
        if (open || wanted.is_none()) && entry.routed != wanted {
            entry.route.set(wanted);
            entry.routed = wanted;
        }
        if open && std::mem::take(&mut entry.pending) {
            entry.route.raise();
        }
    }
}

impl std::fmt::Debug for MsixVectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MsixVectors")
    }
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix").field("layout", &self.layout).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Identity;
    use super::super::test_sink::TestSink;
    use super::*;

    fn msix() -> (ConfigSpace, Msix, Arc<TestSink>) {
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
        let mut config = ConfigSpace::endpoint(&identity);
        let sink = Arc::new(TestSink::default());
        let msix = Msix::new(&mut config, MsixLayout { vectors: 3, bar: 1, table: 0, pending: 0x800 }, &*sink);
        (config, msix, sink)
    }

    fn control(config: &mut ConfigSpace, msix: &mut Msix, value: u16) {
        config.write(0x42, 2, value.into());
        msix.configure(config);
    }

    #[test]
    fn the_capability_says_where_the_table_is() {
        let (config, msix, _) = msix();
        assert_eq!([config.read(0x40, 4), config.read(0x44, 4), config.read(0x48, 4)], [0x2_0011, 1, 0x801]);
        assert!([0, 47, 0x800, 0x807].iter().all(|at| msix.claims(*at)));
        assert!([48, 0x7ff, 0x808].iter().all(|at| !msix.claims(*at)));
    }

    #[test]
    fn a_vector_is_raised_where_it_points_and_waits_while_it_is_masked() {
        let (mut config, mut msix, sink) = msix();
        let vectors = msix.vectors();
        vectors.raise(1);
        msix.write(16, 8, 0x1_fee0_1000);
        msix.write(24, 4, 0x41);
        control(&mut config, &mut msix, ENABLE);
        assert!(vectors.enabled());
        vectors.raise(1);
        vectors.raise(9);
        assert_eq!((msix.read(0x800, 4), msix.read(0x800, 8), sink.raised()), (2, 2, vec![]));
        msix.write(28, 4, 0);
        let message = Message { address: 0x1_fee0_1000, data: 0x41 };
        assert_eq!((msix.read(0x800, 4), sink.raised()), (0, vec![message]));
        control(&mut config, &mut msix, ENABLE | MASK_ALL);
        vectors.raise(1);
        msix.write(24, 4, 0x42);
        control(&mut config, &mut msix, ENABLE);
        assert_eq!(sink.raised(), [message, Message { data: 0x42, ..message }]);
        assert_eq!((msix.read(16, 8), msix.read(24, 8)), (0x1_fee0_1000, 0x42));
        msix.reset();
        vectors.raise(1);
        assert_eq!((sink.raised().len(), msix.read(24, 8)), (2, 1 << 32));
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let (_, mut msix, _) = msix();
        for (offset, len) in [(0, 1), (0, 2), (4, 8), (2, 4), (0x804, 8)] {
            msix.write(offset, len, u64::MAX);
            assert_eq!(msix.read(offset, len), 0);
        }
        assert_eq!(msix.read(0, 8), 0);
    }

    #[test]
    fn a_table_is_restored_with_what_it_owed() {
        let (mut config, mut msix, _) = self::msix();
        msix.write(0, 8, 0xfee0_0000);
        msix.write(8, 8, 0x30);
        control(&mut config, &mut msix, ENABLE | MASK_ALL);
        msix.vectors().raise(0);
        let saved = (config.save(), msix.save());
        let (mut config, mut other, sink) = self::msix();
        assert!(config.restore(&saved.0) && other.restore(&saved.1));
        other.configure(&config);
        assert_eq!((other.read(0x800, 4), sink.raised()), (1, vec![]));
        control(&mut config, &mut other, ENABLE);
        assert_eq!(sink.raised(), [Message { address: 0xfee0_0000, data: 0x30 }]);
        assert!(!other.restore(&MsixState(Vec::new())));
    }
}
