//! The host's end.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::counts::Crossings;
use super::link::{End, Link, Side};
use super::window::ModelledWindow;
use crate::{Bell, BusError, Doorbell, FunctionError, HostFunction, Iova};

/// The host's end of another function, modelled.
///
/// It shares no eventfds ([`HostFunction::shared`]) and has no notify pages: what KVM signals, or the guest writes, by itself would be
/// neither counted nor delayed.
#[derive(Debug)]
pub struct ModelledHost<F> {
    pub(super) inner: F,
    crossings: Arc<Crossings>,
    end: Option<End>,
}

impl<F: HostFunction> ModelledHost<F> {
    /// Counts what `inner` does into `crossings`.
    pub fn new(inner: F, crossings: Arc<Crossings>) -> Self {
        Self::across(inner, crossings, &Link::default())
    }

    /// As [`ModelledHost::new`], with the SoC's end at the other end of `link`.
    pub fn across(inner: F, crossings: Arc<Crossings>, link: &Link) -> Self {
        Self { inner, crossings, end: link.end(Side::Host) }
    }
}

impl<F> Drop for ModelledHost<F> {
    /// To close a device takes configuration accesses, which arrive behind what was posted.
    fn drop(&mut self) {
        if let Some(end) = &self.end {
            end.flush();
        }
    }
}

/// A doorbell, modelled.
#[derive(Clone, Debug)]
pub struct ModelledBell<B> {
    inner: B,
    crossings: Arc<Crossings>,
    end: Option<End>,
}

impl<B: Bell> Bell for ModelledBell<B> {
    fn ring(&self, bell: Doorbell) {
        self.crossings.signalled(Side::Host);
        match &self.end {
            None => self.inner.ring(bell),
            Some(end) => {
                let inner = self.inner.clone();
                end.signal(move || inner.ring(bell));
            }
        }
    }
}

impl<F: HostFunction> HostFunction for ModelledHost<F> {
    type Window = ModelledWindow<F::Window>;
    type Bell = ModelledBell<F::Bell>;

    fn card_memory(&self) -> Self::Window {
        ModelledWindow::far(self.inner.card_memory(), self.crossings.clone(), Side::Host, self.end.clone())
    }

    fn bell(&self) -> Self::Bell {
        ModelledBell { inner: self.inner.bell(), crossings: self.crossings.clone(), end: self.end.clone() }
    }

    fn map_mailbox(&mut self, len: usize, device_writes: bool) -> Result<(Iova, Self::Window), FunctionError> {
        let (iova, inner) = self.inner.map_mailbox(len, device_writes)?;
        Ok((iova, ModelledWindow::near(inner, self.crossings.clone(), self.end.clone())))
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
        if let Some(end) = &self.end {
            end.quiesce();
        }
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
