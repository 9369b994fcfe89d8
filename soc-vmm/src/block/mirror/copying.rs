//! What a copy's threads do: find what there is, and copy what is marked.

use std::ops::Range;
use std::sync::PoisonError;
use std::time::Instant;

use super::{MirrorSync, Side, Work};
use crate::block::{BlockError, Buffer, Extent};

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;
/// Bytes of zeros that are made at once.
const ZEROS: u64 = 1 << 30;
/// What zeros are compared with.
static NOTHING: [u8; 4096] = [0; 4096];
/// What an extent is asked for.
const SURVEY: u64 = 1 << 30;

/// Which disk failed, and how.
type Failed = (Side, BlockError);

impl Work {
    /// Marks what is to be copied at first.
    pub(super) fn survey(&self) {
        let size = self.source.size();
        match self.spec.sync {
            MirrorSync::Full => self.state().map.mark(0, size),
            MirrorSync::Top => {
                let mut at = 0;
                while at < size && !self.is_stopping() {
                    // Nothing that is below now comes to the top but by a write, which is heard of.
                    let (extent, len) = match self.source.extent(at, SURVEY.min(size - at)) {
                        Ok(found) => found,
                        Err(e) => return self.failed(Side::Source, &e),
                    };
                    if extent != Extent::Below {
                        self.state().map.mark(at, len);
                        self.turn.notify_all();
                    }
                    at += len;
                }
            }
        }
        self.state().surveyed = true;
        self.turn.notify_all();
    }

    /// Copies until it is over.
    pub(super) fn copy(&self) {
        let mut buffer = Buffer::default();
        while let Some(taken) = self.take() {
            let done = self.look(&taken).and_then(|(part, extent)| {
                // The rest is for others meanwhile.
                self.give_back(part.end..taken.end, false);
                let done = self.copy_part(&part, extent, &mut buffer);
                self.give_back(part.clone(), done.is_ok());
                done.map_err(|failed| (failed, part.start..part.start))
            });
            if let Err(((side, error), left)) = done {
                self.give_back(left, false);
                return self.failed(side, &error);
            }
        }
    }

    /// Waits for something to copy; none: it is over.
    fn take(&self) -> Option<Range<usize>> {
        let mut state = self.state();
        loop {
            if state.is_over() {
                return None;
            }
            let now = Instant::now();
            if let Some(wait) = state.pace.wait(now) {
                state = self.turn.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            // Much, in case that it is zeros.
            if let Some(clusters) = state.map.take((ZEROS / self.spec.cluster) as usize) {
                return Some(clusters);
            }
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives clusters back: copied, or for others.
    fn give_back(&self, clusters: Range<usize>, copied: bool) {
        if clusters.is_empty() {
            return;
        }
        let mut state = self.state();
        if copied {
            let bytes = state.map.bytes(&clusters);
            state.done += bytes.end - bytes.start;
        }
        let settled = state.map.give_back(clusters, copied);
        drop(state);
        if settled {
            self.disk.wake();
        }
        self.turn.notify_all();
    }

    /// Which of these clusters, the first ones, are best copied together, and what they are. Else who failed, and what is to be given back.
    fn look(&self, taken: &Range<usize>) -> Result<(Range<usize>, Extent), (Failed, Range<usize>)> {
        let bytes = self.state().map.bytes(taken);
        let asked = self.source.extent(bytes.start, bytes.end - bytes.start);
        let (extent, len) = asked.map_err(|e| ((Side::Source, e), taken.clone()))?;
        let cluster = self.spec.cluster;
        // A cluster that is zeros in part is data.
        let whole = if bytes.start + len == bytes.end { taken.len() } else { (len / cluster) as usize };
        if extent == Extent::Zero && whole > 0 {
            return Ok((taken.start..taken.start + whole, Extent::Zero));
        }
        let count = taken.len().min((PIECE / cluster).max(1) as usize);
        Ok((taken.start..taken.start + count, Extent::Data))
    }

    fn copy_part(&self, part: &Range<usize>, extent: Extent, buffer: &mut Buffer) -> Result<(), Failed> {
        let bytes = self.state().map.bytes(part);
        if extent == Extent::Zero {
            return self.zero(bytes);
        }
        let data = buffer.front((bytes.end - bytes.start) as usize);
        self.source.read_at(data, bytes.start).map_err(|e| (Side::Source, e))?;
        self.write(data, bytes.start)
    }

    /// Writes what was read; zeros are made.
    fn write(&self, data: &[u8], at: u64) -> Result<(), Failed> {
        let cluster = self.spec.cluster as usize;
        let is_zero = |piece: &[u8]| piece.chunks(NOTHING.len()).all(|part| part == &NOTHING[..part.len()]);
        let mut done = 0;
        while done < data.len() {
            let mut pieces = data[done..].chunks(cluster);
            let zero = pieces.next().is_some_and(is_zero);
            let more: usize = pieces.take_while(|piece| is_zero(piece) == zero).map(<[u8]>::len).sum();
            let end = (done + cluster).min(data.len()) + more;
            let place = at + done as u64..at + end as u64;
            if zero {
                self.zero(place)?;
            } else {
                self.pay(place.end - place.start);
                self.target.write_at(&data[done..end], place.start).map_err(|e| (Side::Target, e))?;
            }
            done = end;
        }
        Ok(())
    }

    fn zero(&self, place: Range<u64>) -> Result<(), Failed> {
        self.target.write_zeroes(place.start, place.end - place.start, true).map_err(|e| (Side::Target, e))
    }

    fn pay(&self, bytes: u64) {
        self.state().pace.take(bytes, Instant::now());
    }
}
