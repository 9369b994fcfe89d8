//! Guest memory as a balloon has it: frames that can go back to the host.

/// Bytes of a page of the balloon's (§5.5.6), whatever those of the guest or the host are.
pub const PAGE: u64 = 4096;

/// Neighbouring frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Guest-physical address, a multiple of [`PAGE`].
    pub addr: u64,
    /// Bytes, a multiple of [`PAGE`] and not 0.
    pub len: u64,
}

/// Guest memory of which frames can be given back to the host, in two phases. A frame that was is there again, with zeros in it, as soon as
/// anybody touches it: a guest may do that without saying so.
pub trait Pages: Send {
    /// Why no frame can be given back, if that is so: memory is pinned.
    fn pinned(&self) -> Option<String>;

    /// Revokes the SoC's own access: on return no transfer of this process touches these frames, and none does until
    /// [`Pages::free`] has returned. What isn't RAM is an error, and then nothing is revoked.
    ///
    /// # Errors
    /// See [`PagesError`].
    fn revoke(&mut self, runs: &[PageRun]) -> Result<(), PagesError>;

    /// Has the host free what was revoked, and ends the revocation, whether or not that works. Frames that can't be freed by
    /// themselves, as parts of a huge page, stay as they are. The bytes that were freed.
    ///
    /// # Errors
    /// See [`PagesError`].
    fn free(&mut self, runs: &[PageRun]) -> Result<u64, PagesError>;
}

/// Why frames were not given back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagesError {
    /// Not all of it is RAM that the guest may write.
    #[error("{addr:#x} is not RAM")]
    NotRam {
        /// An address.
        addr: u64,
    },
    /// The host refuses, or is gone.
    #[error("the host doesn't take memory back: {0}")]
    Refused(String),
}

/// The runs that these pages are, in order and each page once. `pages` is used up.
pub(super) fn runs_of(pages: &mut Vec<u64>, runs: &mut Vec<PageRun>) {
    runs.clear();
    pages.sort_unstable();
    pages.dedup();
    for page in pages.drain(..) {
        match runs.last_mut() {
            Some(last) if last.addr + last.len == page * PAGE => last.len += PAGE,
            _ => runs.push(PageRun { addr: page * PAGE, len: PAGE }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_run() {
        let mut runs = vec![PageRun { addr: 0, len: 1 }];
        let mut pages = vec![7, 3, 4, 4, 5, 9, 0xffff_ffff];
        runs_of(&mut pages, &mut runs);
        let run = |page, count| PageRun { addr: page * PAGE, len: count * PAGE };
        assert_eq!(runs, [run(3, 3), run(7, 1), run(9, 1), run(0xffff_ffff, 1)]);
        assert!(pages.is_empty());
    }
}
