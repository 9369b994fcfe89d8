//! The SoC's end.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::counts::Crossings;
use super::link::{End, Link, Side};
use super::window::ModelledWindow;
use crate::{BusError, Doorbell, FunctionError, Iova, MemoryFile, SocFunction};

/// The SoC's end of another function, modelled.
#[derive(Debug)]
pub struct ModelledSoc<F> {
    /// What is under way holds it too.
    pub(super) inner: Arc<F>,
    crossings: Arc<Crossings>,
    end: Option<End>,
}

impl<F: SocFunction> ModelledSoc<F> {
    /// Counts what `inner` does into `crossings`.
    pub fn new(inner: F, crossings: Arc<Crossings>) -> Self {
        Self::across(inner, crossings, &Link::default())
    }

    /// As [`ModelledSoc::new`], with the host's end at the other end of `link`.
    pub fn across(inner: F, crossings: Arc<Crossings>, link: &Link) -> Self {
        Self { inner: Arc::new(inner), crossings, end: link.end(Side::Soc) }
    }
}

impl<F> Drop for ModelledSoc<F> {
    /// A device that is closed ends its transfers first.
    fn drop(&mut self) {
        if let Some(end) = &self.end {
            end.flush();
        }
    }
}

impl<F: SocFunction> SocFunction for ModelledSoc<F> {
    type Card = ModelledWindow<F::Card>;
    type Remote = ModelledWindow<F::Remote>;

    fn card_memory(&self) -> Self::Card {
        ModelledWindow::near(self.inner.card_memory(), self.crossings.clone(), self.end.clone())
    }

    fn remote(&self, iova: Iova, len: usize) -> Self::Remote {
        ModelledWindow::far(self.inner.remote(iova, len), self.crossings.clone(), Side::Soc, self.end.clone())
    }

    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError> {
        self.crossings.read(Side::Soc, 1, data.len());
        match &self.end {
            None => self.inner.read(iova, data),
            Some(end) => end.read(1, || self.inner.read(iova, data)),
        }
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), BusError> {
        self.crossings.wrote(Side::Soc, 1, data.len());
        match &self.end {
            None => self.inner.write(iova, data),
            Some(end) => {
                let (inner, data) = (self.inner.clone(), data.to_vec());
                end.transfer(move || inner.write(iova, &data)).unwrap_or(Err(BusError::Dma))
            }
        }
    }

    fn raise(&self, vector: u32) {
        self.crossings.signalled(Side::Soc);
        match &self.end {
            None => self.inner.raise(vector),
            Some(end) => {
                let inner = self.inner.clone();
                end.signal(move || inner.raise(vector));
            }
        }
    }

    fn doorbell(&self, bell: Doorbell) -> BorrowedFd<'_> {
        self.inner.doorbell(bell)
    }

    fn is_near(&self) -> bool {
        self.end.is_none() && self.inner.is_near()
    }

    /// Nothing is counted where the host signals it: it crosses no bus. A link that takes time has none.
    fn share(&self, event: BorrowedFd<'_>) -> Option<u32> {
        if self.end.is_some() { None } else { self.inner.share(event) }
    }

    /// What others do to it is not counted. A link that takes time has none.
    fn file(&self, iova: Iova) -> Option<MemoryFile> {
        if self.end.is_some() { None } else { self.inner.file(iova) }
    }

    fn take_pages(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        self.inner.take_pages(iova, len)
    }

    /// As with shared eventfds: the guest's write is neither counted nor held back, so a link that takes time has none.
    fn notify_pages(&self) -> u32 {
        if self.end.is_some() { 0 } else { self.inner.notify_pages() }
    }

    fn set_notify(&self, page: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        self.inner.set_notify(page, event)
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
