//! Which guest memory below 4 GiB is already spoken for while images are placed.

use super::error::ImageError;
use crate::layout::{BIOS_WINDOW, EBDA, MemoryLayout, ONE_MIB, PAGE_SIZE, boot_data};

/// Guest memory below 4 GiB with what is taken of it.
#[derive(Clone, Debug)]
pub(super) struct Space {
    layout: MemoryLayout,
    taken: Vec<Taken>,
}

#[derive(Clone, Copy, Debug)]
struct Taken {
    start: u64,
    end: u64,
    by: &'static str,
}

impl Space {
    /// The space of `layout`, less what the loader itself and the platform need.
    pub(super) fn new(layout: MemoryLayout) -> Self {
        let taken = vec![
            Taken { start: boot_data::START, end: boot_data::END, by: "taken by the loader's own tables" },
            Taken { start: EBDA, end: ONE_MIB, by: "reserved by the platform" },
        ];
        const { assert!(boot_data::END <= EBDA && EBDA < BIOS_WINDOW) };
        Self { layout, taken }
    }

    /// The layout.
    pub(super) fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Takes `[start, start + len)`, which an image asks for as its `part`.
    pub(super) fn claim(&mut self, start: u64, len: u64, part: &'static str) -> Result<(), ImageError> {
        let refuse = |why| ImageError::BadPlace {
            part,
            start,
            end: u128::from(start) + u128::from(len),
            why,
            low_end: self.layout.low_end(),
        };
        if len == 0 {
            return Ok(());
        }
        if !self.layout.is_low_ram(start, len) {
            return Err(refuse("not all RAM"));
        }
        let end = start + len;
        if let Some(taken) = self.taken.iter().find(|taken| start < taken.end && taken.start < end) {
            return Err(refuse(taken.by));
        }
        self.taken.push(Taken { start, end, by: "already taken by another part of the image" });
        Ok(())
    }

    /// Takes `len` bytes as high as possible in `[from, to)`, on a page boundary, and gives their start.
    pub(super) fn place_high(&mut self, len: u64, from: u64, to: u64) -> Option<u64> {
        let from = from.max(ONE_MIB);
        let mut end = to.min(self.layout.low_end());
        loop {
            let start = end.checked_sub(len)? & !(PAGE_SIZE - 1);
            if start < from {
                return None;
            }
            match self
                .taken
                .iter()
                .filter(|taken| start < taken.end && taken.start < start + len)
                .map(|t| t.start)
                .min()
            {
                // Each round ends below a range that it met, so that there are at most as many rounds as ranges.
                Some(below) => end = below,
                None => {
                    self.taken.push(Taken {
                        start,
                        end: start + len,
                        by: "already taken by another part of the image",
                    });
                    return Some(start);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        Space::new(MemoryLayout::new(16 << 20).unwrap())
    }

    #[test]
    fn claims_are_ram_and_apart() {
        let mut space = space();
        space.claim(ONE_MIB, 0x1000, "a").unwrap();
        space.claim(ONE_MIB + 0x1000, 0x1000, "b").unwrap();
        space.claim(0x4000, 0x1000, "real mode").unwrap();
        space.claim(ONE_MIB, 0, "nothing").unwrap();
        for (start, len) in [
            (ONE_MIB + 0xfff, 2),
            (boot_data::START, 1),
            (0xf_0000, 1),
            (0xa_0000, 0x10),
            (15 << 20, 2 << 20),
            (u64::MAX, 2),
        ] {
            assert!(matches!(space.claim(start, len, "c"), Err(ImageError::BadPlace { .. })), "{start:#x}");
        }
    }

    #[test]
    fn places_high_around_what_is_taken() {
        let mut space = space();
        let end = 16 << 20;
        assert_eq!(space.place_high(100, 0, u64::MAX), Some(end - 0x1000));
        assert_eq!(space.place_high(0x1001, 0, u64::MAX), Some(end - 0x3000));
        space.claim(end - 0x5000, 0x1000, "x").unwrap();
        assert_eq!(space.place_high(0x1000, 0, u64::MAX), Some(end - 0x4000));
        assert_eq!(space.place_high(0x1000, 0, end - 0x3800), Some(end - 0x6000));
        assert_eq!(space.place_high(16 << 20, 0, u64::MAX), None);
        assert_eq!(space.place_high(u64::MAX, 0, u64::MAX), None);
        assert_eq!(space.place_high(0x1000, end, u64::MAX), None);
    }
}
