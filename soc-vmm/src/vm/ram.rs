//! Guest memory by DMA: which guest-physical addresses are memory, and by which IOVAs the function reaches them.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use api_channel::call::{DirtyRun, Discard, Extent, LateRun, Memslot, SlotFlags};
use pcie_function::{BusError, FunctionError, SocFunction};
use tokio::sync::watch;

use super::dirty::WriteLog;
use super::late::Late;
use crate::memory::{Borrower, GuestLog, GuestMemory, Lender, MemoryError, RamFile, RamFiles};
use crate::virtio::balloon::{PageRun, PagesError};

/// How long devices that were reset may take until nobody has guest memory from them: each gives its back end less.
const LETTING_GO: Duration = Duration::from_secs(30);

/// A piece of guest-physical memory that is one piece for DMA too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    base: u64,
    len: u64,
    iova: u64,
    read_only: bool,
    /// The allocation that it is of, and where it begins there.
    ram: u32,
    offset: u64,
}

/// What of guest-physical memory is there.
#[derive(Debug, Default)]
struct Map {
    /// Sorted by base.
    pieces: Vec<Piece>,
    /// Frames that are on their way back to the host: nothing of this process reaches them.
    revoked: Vec<PageRun>,
    /// Where it is noted what is written, while somebody wants to know.
    log: Option<WriteLog>,
    /// Pages that are still on their way here, as long as there are any.
    late: Option<Arc<Late>>,
}

/// The guest's memory as devices and the loader reach it.
#[derive(Debug)]
pub struct GuestRam<F> {
    function: Arc<F>,
    map: RwLock<Map>,
    /// Whether anything is revoked.
    revoking: watch::Sender<bool>,
    /// Who writes the files of it, if anybody does.
    lender: Arc<Lender>,
}

impl<F: SocFunction> GuestRam<F> {
    /// No memory yet.
    pub fn new(function: Arc<F>) -> Self {
        Self { function, map: RwLock::default(), revoking: watch::Sender::new(false), lender: Arc::default() }
    }

    /// Takes over the memslots that the host now has; `extents` gives each allocation's, by its id.
    pub fn set(&self, slots: &[Memslot], extents: &[(u32, Vec<Extent>)]) {
        let mut pieces = Vec::new();
        for slot in slots {
            let of_slot = extents.iter().filter(|(ram, _)| *ram == slot.ram).flat_map(|(_, e)| e);
            for extent in of_slot {
                let first = slot.offset.max(extent.offset);
                let end = (slot.offset + slot.len).min(extent.offset + extent.len);
                if first < end {
                    pieces.push(Piece {
                        base: slot.base + (first - slot.offset),
                        len: end - first,
                        iova: extent.iova + (first - extent.offset),
                        read_only: slot.flags & SlotFlags::READ_ONLY != 0,
                        ram: slot.ram,
                        offset: first,
                    });
                }
            }
        }
        pieces.sort_by_key(|piece| piece.base);
        self.map.write().unwrap_or_else(PoisonError::into_inner).pieces = pieces;
    }

    /// Copies `data` to the bytes from `offset` of the allocation `ram`, which DMA reaches by `extents`, whether or not the guest sees them.
    ///
    /// # Errors
    /// The function is lost.
    pub(super) fn fill(&self, ram: u32, extents: &[Extent], offset: u64, data: &[u8]) -> Result<(), BusError> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let end = offset + data.len() as u64;
        for extent in extents {
            let (first, last) = (extent.offset.max(offset), (extent.offset + extent.len).min(end));
            if first < last {
                let bytes = &data[(first - offset) as usize..(last - offset) as usize];
                let moved = self.function.write(extent.iova + (first - extent.offset), bytes);
                map.log.iter().for_each(|log| log.mark(ram, first, last - first));
                moved?;
            }
        }
        Ok(())
    }

    /// Copies the bytes from `offset` of an allocation, which DMA reaches by `extents`, to `data`, whether or not the guest sees them.
    ///
    /// # Errors
    /// The function is lost.
    pub(super) fn fetch(&self, extents: &[Extent], offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        let end = offset + data.len() as u64;
        for extent in extents {
            let (first, last) = (extent.offset.max(offset), (extent.offset + extent.len).min(end));
            if first < last {
                let bytes = &mut data[(first - offset) as usize..(last - offset) as usize];
                self.function.read(extent.iova + (first - extent.offset), bytes)?;
            }
        }
        Ok(())
    }

    /// From now on whoever reaches for one of these pages waits until it has come; none: all have. On return no transfer is under way that did not ask.
    pub(super) fn set_late(&self, late: Option<Arc<Late>>) {
        self.map.write().unwrap_or_else(PoisonError::into_inner).late = late;
    }

    /// The pages that are still on their way here.
    pub(super) fn late(&self) -> Option<Arc<Late>> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).late.clone()
    }

    /// No page comes any more: whoever waits for one fails.
    pub(super) fn give_up(&self) {
        self.late().iter().for_each(|late| late.give_up());
    }

    /// From now on notes which pages of these allocations are written by here: on return every write before has landed. Asks the same of those
    /// who write without this process: see [`GuestRam::others_log`].
    ///
    /// # Errors
    /// There is no memory for their log.
    pub fn log_writes(&self, allocations: &[(u32, Vec<Extent>)]) -> Result<(), FunctionError> {
        let end = self.allocations().iter().map(|piece| piece.base + piece.len).max().unwrap_or(0);
        let others = Arc::new(GuestLog::new(end)?);
        let log = WriteLog::new(allocations);
        self.map.write().unwrap_or_else(PoisonError::into_inner).log = Some(log);
        self.lender.set_log(Some(others));
        Ok(())
    }

    /// Waits until all who write without this process note that: the names of the devices whose back ends can't. Each may take as long as a
    /// conversation with its back end. A back end may be another one later: who relies on the log asks again when it is over.
    pub async fn others_log(&self) -> Vec<String> {
        self.lender.caught_up().await;
        self.lender.silent()
    }

    /// Notes nothing any more.
    pub fn end_log(&self) {
        self.map.write().unwrap_or_else(PoisonError::into_inner).log = None;
        self.lender.set_log(None);
    }

    /// The pages of an allocation that were written since the last call, while it was noted, by here or by others: their bytes are there.
    pub fn take_written(&self, ram: u32) -> Vec<DirtyRun> {
        let others = self.lender.log().map(|log| (log, self.allocations()));
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let Some(log) = &map.log else { return Vec::new() };
        if let Some((others, pieces)) = &others {
            for piece in pieces.iter().filter(|piece| piece.ram == ram) {
                others.take(piece.base, piece.len).for_each(|at| log.mark(ram, piece.offset + (at - piece.base), 1));
            }
        }
        log.take(ram)
    }

    /// RAM as a guest that is shown all of it sees it: each allocation from its first byte that is shown to its last one.
    fn allocations(&self) -> Vec<Piece> {
        let Map { pieces, .. } = &*self.map.read().unwrap_or_else(PoisonError::into_inner);
        let is_rom = |ram: u32| pieces.iter().all(|piece| piece.ram != ram || piece.read_only);
        let mut whole: Vec<Piece> = Vec::new();
        for piece in pieces.iter().filter(|piece| !is_rom(piece.ram)) {
            let distance = |piece: &Piece| piece.base.wrapping_sub(piece.iova);
            let same = |other: &&mut Piece| other.ram == piece.ram && distance(other) == distance(piece);
            match whole.iter_mut().find(same) {
                Some(other) => other.len = piece.base + piece.len - other.base,
                None => whole.push(*piece),
            }
        }
        whole
    }

    /// Takes these frames away from everything that goes by here, until [`GuestRam::give_back`]; where they are in their allocations. On
    /// return no transfer is under way in them.
    ///
    /// # Errors
    /// Not all of it is RAM that the guest may write: nothing is taken.
    pub(super) fn revoke(&self, runs: &[PageRun]) -> Result<Vec<Discard>, PagesError> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let mut places = Vec::new();
        for &PageRun { addr, len } in runs {
            let (mut at, end) = (addr, addr.saturating_add(len));
            while at < end {
                let index = map.pieces.partition_point(|piece| piece.base <= at).checked_sub(1);
                let piece = index.map(|index| map.pieces[index]);
                let piece = piece.filter(|piece| at - piece.base < piece.len && !piece.read_only);
                let Some(piece) = piece else { return Err(PagesError::NotRam { addr: at }) };
                let within = at - piece.base;
                let len = (piece.len - within).min(end - at);
                places.push(Discard { ram: piece.ram, reserved: 0, offset: piece.offset + within, len });
                at += len;
            }
        }
        map.revoked.extend(runs);
        self.revoking.send_replace(true);
        Ok(places)
    }

    /// Ends what [`GuestRam::revoke`] began.
    pub(super) fn give_back(&self) {
        self.map.write().unwrap_or_else(PoisonError::into_inner).revoked.clear();
        self.revoking.send_replace(false);
    }

    /// Waits until nothing is revoked, and nobody has the files: before memory is filled anew, with all devices reset.
    pub(super) async fn whole(&self) {
        // This side is there as long as anybody waits.
        let _ = self.revoking.subscribe().wait_for(|revoking| !revoking).await;
        if tokio::time::timeout(LETTING_GO, self.lender.settled()).await.is_err() {
            tracing::error!("guest memory is still lent to the back ends of {}", self.lender.debtors().join(", "));
        }
    }

    /// The loader's view of the same memory: ROM can be written.
    pub fn loader(&self) -> Loader<'_, F> {
        Loader(self)
    }

    /// Calls `transfer` with (IOVA, first byte, bytes) for each piece of the range, once all of it is known to be memory.
    fn each(
        &self,
        addr: u64,
        len: u64,
        write_rom: Option<bool>,
        mut transfer: impl FnMut(u64, usize, usize) -> Result<(), BusError>,
    ) -> Result<(), MemoryError> {
        let not_ram = MemoryError::NotRam { addr, len };
        let end = addr.checked_add(len).ok_or(not_ram)?;
        // Held while bytes move: who takes memory from the guest waits until nothing reaches it any more.
        let Map { pieces, revoked, log, late } = &*self.map.read().unwrap_or_else(PoisonError::into_inner);
        if revoked.iter().any(|run| run.addr < end && addr < run.addr + run.len) {
            return Err(not_ram);
        }
        let part = |at: u64| {
            let index = pieces.partition_point(|piece| piece.base <= at).checked_sub(1)?;
            let (piece, within) = (pieces[index], at - pieces[index].base);
            let writable = !piece.read_only || write_rom != Some(false);
            (within < piece.len && writable).then(|| (piece, within, (piece.len - within).min(end - at)))
        };
        // Twice: nothing moves before all of it is known to be there.
        let mut at = addr;
        while at < end {
            let (piece, within, count) = part(at).ok_or(not_ram)?;
            if let Some(late) = late
                && let Some(LateRun { ram, first, .. }) = late.missing(piece.ram, piece.offset + within, count)
            {
                return Err(MemoryError::Late { ram, page: first });
            }
            at += count;
        }
        let mut at = addr;
        while let Some((piece, within, count)) = (at < end).then(|| part(at)).flatten() {
            let moved = transfer(piece.iova + within, (at - addr) as usize, count as usize);
            // Behind the bytes, of which some may have come though not all did.
            if let Some(log) = log.as_ref().filter(|_| write_rom.is_some()) {
                log.mark(piece.ram, piece.offset + within, count);
            }
            moved.map_err(|_| MemoryError::Lost { addr, len })?;
            at += count;
        }
        Ok(())
    }

    /// Has `transfer` done, by one that may have to wait: without any lock meanwhile.
    fn waiting(&self, mut transfer: impl FnMut() -> Result<(), MemoryError>) -> Result<(), MemoryError> {
        loop {
            match transfer() {
                Err(late @ MemoryError::Late { .. }) => self.wait_for(late)?,
                done => return done,
            }
        }
    }

    fn write_checked(&self, addr: u64, data: &[u8], rom: bool) -> Result<(), MemoryError> {
        self.each(addr, data.len() as u64, Some(rom), |iova, at, len| self.function.write(iova, &data[at..at + len]))
    }
}

impl<F: SocFunction> GuestMemory for GuestRam<F> {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.waiting(|| self.read_now(addr, data))
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.waiting(|| self.write_now(addr, data))
    }

    fn read_now(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let len = data.len() as u64;
        self.each(addr, len, None, |iova, at, len| self.function.read(iova, &mut data[at..at + len]))
    }

    fn write_now(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.write_checked(addr, data, false)
    }

    fn wait_for(&self, late: MemoryError) -> Result<(), MemoryError> {
        let MemoryError::Late { ram, page } = late else { return Err(late) };
        // None: all have come meanwhile.
        let Some(waits) = self.late() else { return Ok(()) };
        waits.wait(LateRun { ram, reserved: 0, first: page, pages: 1 }).map_err(|_| late)
    }

    fn is_near(&self) -> bool {
        self.function.is_near()
    }

    fn files(&self, borrower: &Arc<Borrower>) -> Option<RamFiles> {
        // Who maps them doesn't ask for a page before it is touched.
        if self.late().is_some() {
            return None;
        }
        let file = |Piece { base, len, iova, .. }: Piece| {
            let file = self.function.file(iova).filter(|file| file.len >= len)?;
            Some(RamFile { base, len, file })
        };
        let files: Option<Vec<RamFile>> = self.allocations().into_iter().map(file).collect();
        Some(self.lender.lend(files.filter(|files| !files.is_empty())?, borrower))
    }
}

/// See [`GuestRam::loader`].
#[derive(Debug)]
pub struct Loader<'a, F>(&'a GuestRam<F>);

impl<F: SocFunction> GuestMemory for Loader<'_, F> {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read(addr, data)
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.0.waiting(|| self.0.write_checked(addr, data, true))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use pcie_function::HostFunction;
    use pcie_function::local::{LocalHost, LocalSoc, sealed_memfd};

    use super::*;
    use crate::virtio::{Lease, QueueError};

    type Made = (GuestRam<LocalSoc>, Vec<(u32, Vec<Extent>)>, LocalHost);

    const LEN: u64 = 16 << 12;
    const RAM: u32 = 3;

    /// A function with an allocation that the guest sees at 1 MiB, of which the last page is read-only; its host's end.
    fn ram() -> Made {
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.unwrap();
        let mut host = std::thread::scope(|scope| {
            let host = scope.spawn(|| LocalHost::new(ours).unwrap());
            let function = LocalSoc::new(theirs).unwrap();
            (host.join().unwrap(), function)
        });
        let memory = sealed_memfd("ram", LEN).unwrap();
        host.0.map_ram(memory.as_fd(), 0, 0x10_0000, LEN, true).unwrap();
        let ram = GuestRam::new(Arc::new(host.1));
        let extents = vec![(RAM, vec![Extent { offset: 0, iova: 0x10_0000, len: LEN }])];
        let slot = |offset, len, flags| Memslot { base: 0x10_0000 + offset, len, offset, ram: RAM, flags };
        ram.set(&[slot(0, LEN - 4096, 0), slot(LEN - 4096, 4096, SlotFlags::READ_ONLY)], &extents);
        (ram, extents, host.0)
    }

    #[test]
    fn what_is_written_while_it_is_noted_is_told_by_its_place_in_the_allocation() {
        let (ram, extents, _host) = ram();
        ram.write(0x10_0000, &[1]).unwrap();
        ram.log_writes(&extents).unwrap();
        assert!(ram.take_written(RAM).is_empty());
        ram.write(0x10_2fff, &[1; 2]).unwrap();
        ram.read(0x10_5000, &mut [0; 4096]).unwrap();
        assert!(ram.write(0x10_f000, &[1]).is_err(), "a device writes no ROM");
        ram.loader().write(0x10_f000, &[1]).unwrap();
        ram.fill(RAM, &extents[0].1, 0x8000, &[7; 8]).unwrap();
        let mut back = [0; 10];
        ram.fetch(&extents[0].1, 0x7fff, &mut back).unwrap();
        assert_eq!(back, [0, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
        let run = |first, pages| DirtyRun { first, pages };
        assert_eq!(ram.take_written(RAM), [run(2, 2), run(8, 1), run(15, 1)]);
        ram.write(0x10_2000, &[1]).unwrap();
        ram.end_log();
        assert!(ram.take_written(RAM).is_empty());
    }

    #[tokio::test]
    async fn ram_is_lent_as_files_and_is_not_filled_anew_before_it_is_back() {
        let (ram, _, _host) = ram();
        let [a, b] = ["a", "b"].map(|name| Arc::new(Borrower::new(name).unwrap()));
        let files = ram.files(&a).unwrap();
        let [piece] = &files.pieces[..] else { panic!("{files:?}") };
        // Its last page is read-only now, and RAM all the same.
        assert_eq!((piece.base, piece.len, piece.file.offset), (0x10_0000, LEN, 0));
        assert!(piece.has(0x10_0000, LEN) && !piece.has(0xf_ffff, 2) && !piece.has(0x10_ffff, 2) && !piece.has(!0, 2));
        ram.write(0x10_2000, &[7]).unwrap();
        let mut byte = [0];
        nix::sys::uio::pread(piece.fd(), &mut byte, 0x2000).unwrap();
        assert_eq!(byte, [7]);
        let other = ram.files(&b).unwrap();
        let mut whole = Box::pin(ram.whole());
        for files in [files, other] {
            assert!(tokio::time::timeout(std::time::Duration::from_millis(1), &mut whole).await.is_err());
            drop(files);
        }
        whole.await;
    }

    #[tokio::test]
    async fn what_others_write_is_told_with_what_is_written_here_and_who_tells_nothing_is_named() {
        let (ram, extents, _host) = ram();
        let [a, b] = ["a", "b"].map(|name| Arc::new(Borrower::new(name).unwrap()));
        a.set_logs(true);
        let before = ram.files(&a).unwrap();
        ram.log_writes(&extents).unwrap();
        assert!(before.log.is_none() && before.is_stale());
        // Who has the files from before may write without a word.
        let mut others = Box::pin(ram.others_log());
        assert!(tokio::time::timeout(std::time::Duration::from_millis(1), &mut others).await.is_err());
        let files = ram.files(&a).unwrap();
        drop(before);
        assert!(others.await.is_empty() && !files.is_stale());
        let log = files.log.as_ref().unwrap();
        // Page 0x100 is where the guest's memory begins; the one before it is nobody's.
        nix::sys::uio::pwrite(log.fd(), &[0x80, 0b101], 0x1f).unwrap();
        ram.write(0x10_1000, &[1]).unwrap();
        let run = |first, pages| DirtyRun { first, pages };
        assert_eq!(ram.take_written(RAM), [run(0, 3)]);
        assert!(ram.take_written(RAM).is_empty());
        let _mute = ram.files(&b).unwrap();
        assert_eq!(ram.others_log().await, ["b"]);
        ram.end_log();
        assert!(files.is_stale());
    }

    #[test]
    fn an_allocation_is_one_piece_whatever_hides_parts_of_it_and_rom_is_none() {
        let (ram, extents, _host) = ram();
        let slot = |offset, len, flags| Memslot { base: 0x10_0000 + offset, len, offset, ram: RAM, flags };
        ram.set(&[slot(0, 0x1000, 0), slot(0x4000, 0x1000, SlotFlags::READ_ONLY), slot(0x8000, 0x2000, 0)], &extents);
        let shown = |ram: &GuestRam<LocalSoc>| {
            let files = ram.files(&Arc::new(Borrower::new("a").unwrap()))?;
            Some(files.pieces.iter().map(|piece| (piece.base, piece.len)).collect::<Vec<_>>())
        };
        assert_eq!(shown(&ram), Some(vec![(0x10_0000, 0xa000)]));
        ram.set(&[slot(0, 0x1000, SlotFlags::READ_ONLY)], &extents);
        assert_eq!(shown(&ram), None);
        // The guest sees parts at different distances.
        ram.set(&[slot(0, 0x1000, 0), Memslot { base: 0x80_0000, ..slot(0x2000, 0x1000, 0) }], &extents);
        assert_eq!(shown(&ram), Some(vec![(0x10_0000, 0x1000), (0x80_0000, 0x1000)]));
    }

    #[tokio::test]
    async fn frames_on_their_way_back_are_reached_by_nobody() {
        let (ram, _, _host) = ram();
        let run = |addr, len| PageRun { addr, len };
        assert_eq!(
            ram.revoke(&[run(0x10_1000, 0x1000), run(0x10_e000, 0x2000)]),
            Err(PagesError::NotRam { addr: 0x10_f000 })
        );
        ram.write(0x10_1000, &[1]).unwrap();
        let places = ram.revoke(&[run(0x10_1000, 0x2000)]).unwrap();
        assert_eq!(places, [Discard { ram: RAM, reserved: 0, offset: 0x1000, len: 0x2000 }]);
        for addr in [0x10_0fff, 0x10_1000, 0x10_2ffe] {
            assert!(ram.write(addr, &[1; 2]).is_err() && ram.read(addr, &mut [0; 2]).is_err(), "{addr:#x}");
        }
        ram.write(0x10_3000, &[1]).unwrap();
        let mut whole = Box::pin(ram.whole());
        assert!(tokio::time::timeout(std::time::Duration::from_millis(1), &mut whole).await.is_err());
        ram.give_back();
        whole.await;
        ram.write(0x10_1000, &[1]).unwrap();
    }

    #[test]
    fn who_reaches_for_a_page_that_has_not_come_waits_without_a_lock() {
        let (ram, extents, _host) = ram();
        let late = Arc::new(Late::default());
        let page = LateRun { ram: RAM, reserved: 0, first: 3, pages: 1 };
        late.lacks(page, 16, 1);
        ram.set_late(Some(late.clone()));
        let ram = Arc::new(ram);
        // Around it nobody waits; who may not wait hears of it.
        ram.write(0x10_2fff, &[1]).unwrap();
        assert_eq!(ram.read_now(0x10_2fff, &mut [0; 2]), Err(MemoryError::Late { ram: RAM, page: 3 }));
        let lease = Lease::new(ram.clone());
        std::thread::scope(|scope| {
            let reads = scope.spawn(|| {
                let mut bytes = [0; 2];
                ram.read(0x10_2fff, &mut bytes).map(|()| bytes)
            });
            let leased = scope.spawn(|| lease.write(0x10_3000, &[9]));
            while late.wanted(Duration::from_secs(60)) != [page] {}
            // Neither is in the way of who changes what there is, or takes memory back from a device.
            ram.set(&[Memslot { base: 0x10_0000, len: LEN, offset: 0, ram: RAM, flags: 0 }], &extents);
            lease.revoke();
            ram.fill(RAM, &extents[0].1, 3 << 12, &[7; 4096]).unwrap();
            late.came(page);
            assert_eq!(reads.join().unwrap(), Ok([1, 7]));
            assert_eq!(leased.join().unwrap(), Err(QueueError::Revoked));
        });
        // What never comes is an error, for whoever waits.
        late.lacks(page, 16, 1);
        ram.give_up();
        assert_eq!(ram.write(0x10_3000, &[1]), Err(MemoryError::Late { ram: RAM, page: 3 }));
        ram.set_late(None);
        ram.write(0x10_3000, &[1]).unwrap();
    }
}
