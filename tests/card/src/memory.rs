//! Memory that the card shares with other processes: its own, and what DMA reaches.
//!
//! A file that shrinks under a mapping turns an access into SIGBUS, which would take down every function of the card. So only
//! files that are sealed against shrinking are mapped, and nothing past the size that they had then.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use pcie_function::{BusMemory, Mapping, Reach, Window};

/// Maps all of a file that can't shrink.
///
/// # Errors
/// The file is empty, isn't sealed against shrinking, or can't be mapped for reading and writing.
pub(crate) fn map(file: &File) -> io::Result<Arc<Mapping>> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS)?;
    if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(io::Error::other("not sealed against shrinking"));
    }
    let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    Mapping::new(file.as_fd(), 0, len, Reach::Local).map_err(io::Error::other)
}

/// Stores `data` as aligned words, up to 63 of them ascending, bytes where it isn't aligned; what comes last in it after all before it, and after every
/// earlier store.
pub(crate) fn store(memory: &Window, offset: usize, data: &[u8]) {
    match data.split_last_chunk::<8>() {
        Some((before, last)) if (offset + before.len()).is_multiple_of(8) => {
            memory.write_bytes(offset, before);
            memory.store(offset + before.len(), u64::from_le_bytes(*last));
        }
        _ => {
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
            memory.write_bytes(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn every_alignment_and_length_comes_back_and_touches_nothing_else() {
        let file = File::from(pcie_function::local::sealed_memfd("test", 4096).unwrap());
        let memory = map(&file).unwrap().window();
        for at in 0..16 {
            for len in 0..40 {
                store(&memory, 0, &[0xee; 64]);
                let data: Vec<u8> = (1..=len).collect();
                store(&memory, at, &data);
                let mut all = [0; 64];
                memory.read_bytes(0, &mut all);
                let mut expected = [0xee; 64];
                expected[at..at + data.len()].copy_from_slice(&data);
                assert_eq!(all, expected);
            }
        }
    }

    #[test]
    fn a_file_that_can_shrink_is_not_mapped() {
        let file = File::from(memfd_create("test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        file.set_len(4096).unwrap();
        assert!(map(&file).is_err());
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        assert_eq!(map(&file).unwrap().size(), 4096);
    }
}
