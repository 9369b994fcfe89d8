//! A disk image that anyone may have written, and the calls of a disk's device on it.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use fuzz::is_one_line;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::block::{self, BlockError, ImageFormat, ImageSpec};

/// Clusters of 512 bytes: header, L1 table, table of reference counts, their block, L2 table, data.
const CLUSTERS: u64 = 6;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Words that are put over a good qcow2 image's.
    words: Vec<(u16, u64)>,
    /// Bytes behind its header's fixed part: extensions, names.
    tail: &'a [u8],
    /// Where the file ends.
    end: Option<u16>,
    raw: bool,
    read_only: bool,
    calls: Vec<Call>,
}

#[derive(Arbitrary, Debug)]
enum Call {
    Read { sector: u8, count: u8 },
    Write { sector: u8, count: u8, byte: u8 },
    Zero { sector: u8, count: u8, may_unmap: bool },
    Discard { sector: u8, count: u8 },
    Flush,
}

fn good() -> [u8; 512 * CLUSTERS as usize] {
    let mut image = [0; 512 * CLUSTERS as usize];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9u32.to_be_bytes());
    put(24, &(64u64 * 512).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &512u64.to_be_bytes());
    put(48, &1024u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(512, &(4 * 512 | 1u64 << 63).to_be_bytes());
    put(1024, &(3 * 512u64).to_be_bytes());
    for cluster in 0..CLUSTERS as usize {
        put(3 * 512 + 2 * cluster, &1u16.to_be_bytes());
    }
    put(4 * 512, &(5 * 512 | 1u64 << 63).to_be_bytes());
    put(5 * 512, &[0xda; 512]);
    image
}

fuzz_target!(|input: Input<'_>| {
    let mut bytes = good();
    let tail = input.tail.len().min(512 - 104);
    bytes[104..104 + tail].copy_from_slice(&input.tail[..tail]);
    for (at, word) in &input.words {
        let at = usize::from(*at) % (bytes.len() / 8) * 8;
        bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
    }
    let end = input.end.map_or(bytes.len(), |end| usize::from(end) % bytes.len());
    let fd = nix::sys::memfd::memfd_create(c"image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.write_all_at(&bytes[..end], 0).expect("a memfd is written");
    let spec = ImageSpec {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        format: Some(if input.raw { ImageFormat::Raw } else { ImageFormat::Qcow2 }),
        read_only: input.read_only,
        direct: false,
        unclaimed: false,
    };
    let image = match block::open(&spec) {
        Ok(image) => image,
        Err(error) => return check(&error),
    };
    assert!(image.size() > 0 && image.size().is_multiple_of(512));
    assert_eq!(image.is_read_only(), input.read_only);
    for call in input.calls.into_iter().take(32) {
        let place = |sector: u8, count: u8| (u64::from(sector % 80) * 512, usize::from(count % 16) * 512);
        let done = match call {
            Call::Read { sector, count } => {
                let (at, len) = place(sector, count);
                image.read_at(&mut vec![0; len], at)
            }
            Call::Write { sector, count, byte } => {
                let (at, len) = place(sector, count);
                image.write_at(&vec![byte; len], at)
            }
            Call::Zero { sector, count, may_unmap } => {
                let (at, len) = place(sector, count);
                image.write_zeroes(at, len as u64, may_unmap)
            }
            Call::Discard { sector, count } => {
                let (at, len) = place(sector, count);
                image.discard(at, len as u64)
            }
            Call::Flush => image.flush(),
        };
        if let Err(error) = done {
            check(&error);
        }
    }
    drop(image);
    if input.read_only {
        let mut after = vec![0; end];
        file.read_exact_at(&mut after, 0).expect("a memfd is read");
        assert_eq!(after, bytes[..end]);
    }
});

fn check(error: &BlockError) {
    let line = soc_vmm::cli::Failure::of(soc_vmm::cli::ExitStatus::Usage, "", error).to_string();
    assert!(is_one_line(&line), "{line}");
}
