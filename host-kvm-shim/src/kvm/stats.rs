//! KVM's own counters, as its statistics descriptors tell them (KVM api.rst §4.133).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// The statistics descriptor of a VM or a vCPU.
#[derive(Debug)]
pub(crate) struct StatsFd(File);

/// A counter by its name, at most 47 bytes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counter {
    pub(crate) name: String,
    pub(crate) value: u64,
}

/// Bytes of `struct kvm_stats_header`, and of `struct kvm_stats_desc` before the name.
const HEADER: usize = 24;
const DESCRIPTION: usize = 16;
/// Most bytes of anything that a descriptor is believed to hold.
const MOST: usize = 1 << 16;

impl StatsFd {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Reads every single-valued counter.
    pub(crate) fn read(&self) -> std::io::Result<Vec<Counter>> {
        let mut header = [0; HEADER];
        self.0.read_exact_at(&mut header, 0)?;
        let word = |i: usize| u32::from_le_bytes(header.as_chunks::<4>().0[i]) as usize;
        let (name_size, count, descriptions, data) = (word(1), word(2), word(4), word(5));
        let each = DESCRIPTION + name_size;
        let size = each.checked_mul(count).filter(|&n| n <= MOST).ok_or(std::io::ErrorKind::InvalidData)?;
        let mut table = vec![0; size];
        self.0.read_exact_at(&mut table, descriptions as u64)?;
        table
            .chunks_exact(each)
            .filter_map(describe)
            .map(|(name, offset)| {
                let mut value = [0; 8];
                self.0.read_exact_at(&mut value, data as u64 + u64::from(offset))?;
                Ok(Counter { name, value: u64::from_le_bytes(value) })
            })
            .collect()
    }
}

/// Name and data offset of a counter that is one number; `None` for histograms.
fn describe(description: &[u8]) -> Option<(String, u32)> {
    let size = u16::from_le_bytes(description.get(6..8)?.try_into().ok()?);
    let offset = u32::from_le_bytes(description.get(8..12)?.try_into().ok()?);
    let name = description.get(DESCRIPTION..)?;
    let len = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    let name = std::str::from_utf8(&name[..len]).ok()?;
    (size == 1).then(|| (name.to_owned(), offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_number_is_a_counter_and_a_histogram_is_not() {
        let describe_with = |size: u16| {
            let mut d = vec![0; DESCRIPTION];
            d[6..8].copy_from_slice(&size.to_le_bytes());
            d[8..12].copy_from_slice(&40u32.to_le_bytes());
            d.extend_from_slice(b"io_exits\0\0");
            describe(&d)
        };
        assert_eq!(describe_with(1), Some(("io_exits".into(), 40)));
        assert_eq!(describe_with(20), None);
        assert_eq!(describe(&[0; 3]), None);
    }
}
