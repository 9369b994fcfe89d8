//! A function that counts what crosses the bus.
//!
//! Wraps another function's ends. The counts are those that a PCIe analyser would show: a store to the BAR is a posted TLP, a load
//! from it a non-posted read; a store to the mailbox from the SoC is a DMA write, a load a DMA read; a doorbell is a posted write
//! of its own; a vector is an interrupt. What is local to a side costs nothing.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Bell, BusError, BusMemory, Doorbell, FunctionError, HostFunction, Iova, SocFunction, Windowed};

/// Crossings since the start, by kind. Shared by both ends where one process holds both.
#[derive(Debug, Default)]
pub struct Crossings {
    posted: AtomicU64,
    posted_bytes: AtomicU64,
    reads: AtomicU64,
    dma_writes: AtomicU64,
    dma_write_bytes: AtomicU64,
    dma_reads: AtomicU64,
    dma_read_bytes: AtomicU64,
    doorbells: AtomicU64,
    vectors: AtomicU64,
}

/// [`Crossings`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Stores of the host to the BAR, in TLPs.
    pub posted: u64,
    /// Their bytes.
    pub posted_bytes: u64,
    /// Non-posted reads: loads of the host from the BAR.
    pub reads: u64,
    /// DMA writes of the SoC.
    pub dma_writes: u64,
    /// Their bytes.
    pub dma_write_bytes: u64,
    /// DMA reads of the SoC.
    pub dma_reads: u64,
    /// Their bytes.
    pub dma_read_bytes: u64,
    /// Doorbells that the host rang.
    pub doorbells: u64,
    /// Vectors that the SoC raised.
    pub vectors: u64,
}

impl Crossings {
    /// The counts now.
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            posted: get(&self.posted),
            posted_bytes: get(&self.posted_bytes),
            reads: get(&self.reads),
            dma_writes: get(&self.dma_writes),
            dma_write_bytes: get(&self.dma_write_bytes),
            dma_reads: get(&self.dma_reads),
            dma_read_bytes: get(&self.dma_read_bytes),
            doorbells: get(&self.doorbells),
            vectors: get(&self.vectors),
        }
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// From which side a counted window is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// The host looks at the BAR.
    HostBar,
    /// The SoC looks at host memory.
    SocRemote,
}

/// A window whose crossings are counted.
#[derive(Clone, Debug)]
pub struct Counted<W> {
    inner: W,
    side: Option<Side>,
    crossings: Arc<Crossings>,
}

impl<W> Counted<W> {
    /// One store of `len` bytes, at most a line.
    fn stored(&self, tlps: u64, len: usize) {
        match self.side {
            None => {}
            Some(Side::HostBar) => {
                add(&self.crossings.posted, tlps);
                add(&self.crossings.posted_bytes, len as u64);
            }
            Some(Side::SocRemote) => {
                add(&self.crossings.dma_writes, 1);
                add(&self.crossings.dma_write_bytes, len as u64);
            }
        }
    }

    fn loaded(&self, words: u64, len: usize) {
        match self.side {
            None => {}
            Some(Side::HostBar) => add(&self.crossings.reads, words),
            Some(Side::SocRemote) => {
                add(&self.crossings.dma_reads, 1);
                add(&self.crossings.dma_read_bytes, len as u64);
            }
        }
    }
}

impl<W: Windowed> Windowed for Counted<W> {
    fn cut(&self, offset: usize, len: usize) -> Option<Self> {
        let inner = self.inner.cut(offset, len)?;
        Some(Self { inner, side: self.side, crossings: self.crossings.clone() })
    }
}

impl<W: BusMemory> BusMemory for Counted<W> {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn load(&self, offset: usize) -> u64 {
        self.loaded(1, 8);
        self.inner.load(offset)
    }

    fn store(&self, offset: usize, word: u64) {
        self.stored(1, 8);
        self.inner.store(offset, word);
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        self.stored(words.len() as u64, words.len() * 8);
        self.inner.store_line(offset, words);
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        self.stored(data.len().div_ceil(8) as u64, data.len());
        self.inner.copy_in(offset, data);
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        self.loaded(data.len().div_ceil(8) as u64, data.len());
        self.inner.copy_out(offset, data);
    }

    fn fence(&self) {
        self.inner.fence();
    }

    fn flush(&self) -> Result<(), BusError> {
        if self.side == Some(Side::HostBar) {
            self.loaded(1, 8);
        }
        self.inner.flush()
    }
}

/// The host's end, counted.
#[derive(Debug)]
pub struct ModelledHost<F> {
    inner: F,
    crossings: Arc<Crossings>,
}

impl<F: HostFunction> ModelledHost<F> {
    /// Counts what `inner` does into `crossings`.
    pub fn new(inner: F, crossings: Arc<Crossings>) -> Self {
        Self { inner, crossings }
    }
}

/// A doorbell, counted.
#[derive(Clone, Debug)]
pub struct CountedBell<B> {
    inner: B,
    crossings: Arc<Crossings>,
}

impl<B: Bell> Bell for CountedBell<B> {
    fn ring(&self, bell: Doorbell) {
        add(&self.crossings.doorbells, 1);
        self.inner.ring(bell);
    }
}

impl<F: HostFunction> HostFunction for ModelledHost<F> {
    type Window = Counted<F::Window>;
    type Bell = CountedBell<F::Bell>;

    fn card_memory(&self) -> Self::Window {
        Counted { inner: self.inner.card_memory(), side: Some(Side::HostBar), crossings: self.crossings.clone() }
    }

    fn bell(&self) -> Self::Bell {
        CountedBell { inner: self.inner.bell(), crossings: self.crossings.clone() }
    }

    fn map_mailbox(&mut self, len: usize, device_writes: bool) -> Result<(Iova, Self::Window), FunctionError> {
        let (iova, inner) = self.inner.map_mailbox(len, device_writes)?;
        Ok((iova, Counted { inner, side: None, crossings: self.crossings.clone() }))
    }

    fn map_ram(
        &mut self,
        ram: BorrowedFd<'_>,
        offset: u64,
        iova: Iova,
        len: u64,
        writes: bool,
    ) -> Result<(), FunctionError> {
        self.inner.map_ram(ram, offset, iova, len, writes)
    }

    fn unmap(&mut self, iova: Iova) -> Result<(), FunctionError> {
        self.inner.unmap(iova)
    }

    fn vectors(&self) -> u32 {
        self.inner.vectors()
    }

    fn vector(&self, vector: u32) -> Option<BorrowedFd<'_>> {
        self.inner.vector(vector)
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.inner.lost_event()
    }

    fn check(&self) -> Result<(), BusError> {
        self.inner.check()
    }
}

/// The SoC's end, counted.
#[derive(Debug)]
pub struct ModelledSoc<F> {
    inner: F,
    crossings: Arc<Crossings>,
}

impl<F: SocFunction> ModelledSoc<F> {
    /// Counts what `inner` does into `crossings`.
    pub fn new(inner: F, crossings: Arc<Crossings>) -> Self {
        Self { inner, crossings }
    }
}

impl<F: SocFunction> SocFunction for ModelledSoc<F> {
    type Card = F::Card;
    type Remote = Counted<F::Remote>;

    fn card_memory(&self) -> F::Card {
        self.inner.card_memory()
    }

    fn remote(&self, iova: Iova, len: usize) -> Self::Remote {
        let inner = self.inner.remote(iova, len);
        Counted { inner, side: Some(Side::SocRemote), crossings: self.crossings.clone() }
    }

    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError> {
        add(&self.crossings.dma_reads, 1);
        add(&self.crossings.dma_read_bytes, data.len() as u64);
        self.inner.read(iova, data)
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), BusError> {
        add(&self.crossings.dma_writes, 1);
        add(&self.crossings.dma_write_bytes, data.len() as u64);
        self.inner.write(iova, data)
    }

    fn raise(&self, vector: u32) {
        add(&self.crossings.vectors, 1);
        self.inner.raise(vector);
    }

    fn doorbell(&self, bell: Doorbell) -> BorrowedFd<'_> {
        self.inner.doorbell(bell)
    }

    fn generation(&self) -> u32 {
        self.inner.generation()
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.inner.lost_event()
    }

    fn check(&self) -> Result<(), BusError> {
        self.inner.check()
    }

    fn renew(&self) -> Result<(), BusError> {
        self.inner.renew()
    }
}
