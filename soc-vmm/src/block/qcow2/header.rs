//! The header of a qcow2 file (QEMU `docs/interop/qcow2.txt`, "Header"), as far as it decides whether the image can be opened.

use std::os::unix::fs::FileExt;

use crate::block::error::ImageProblem;
use crate::block::file::{Opened, QCOW2_MAGIC};

/// Bytes of the header of version 2, and of the fixed part of version 3.
pub(super) const LEN_2: usize = 72;
const LEN_3: usize = 104;
/// Where its autoclear features are.
const AUTOCLEAR: u64 = 88;
/// Extensions: the end, and the backing file's format.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Most bytes of a backing file's name, and sizes of clusters, as powers of two.
const NAME_MAX: u32 = 1023;
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// What an image needs of its reader (incompatible features), where its bit can be named.
const FEATURES: [(u64, &str, &str); 5] = [
    (1 << 0, "was not closed in order", "repair it (qemu-img check -r all)"),
    (1 << 1, "is marked as corrupt", "repair it (qemu-img check -r all)"),
    (1 << 2, "keeps its data in another file", "convert it (qemu-img convert)"),
    (1 << 3, "is compressed with something else than zlib", "convert it (qemu-img convert -o compression_type=zlib)"),
    (1 << 4, "has extended L2 entries", "convert it (qemu-img convert -o extended_l2=off)"),
];

/// What is in a header.
#[derive(Debug)]
pub(super) struct Header {
    /// Bytes of a cluster; the first is the header's.
    pub(super) cluster: u64,
    /// What it stands on.
    pub(super) backing: Option<Backing>,
}

/// A backing file as it is named.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

impl Header {
    /// Reads and checks the header of a file.
    pub(super) fn read(opened: &Opened) -> Result<Self, ImageProblem> {
        let mut bytes = [0; LEN_3];
        opened.read_up_to(&mut bytes, 0)?;
        if bytes[..4] != QCOW2_MAGIC {
            return Err(ImageProblem::NotQcow2);
        }
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        let within = |part, start: u64, len: u64| match start.checked_add(len) {
            Some(end) if end <= opened.len => Ok(()),
            end => Err(ImageProblem::Truncated { part, end: end.unwrap_or(u64::MAX), size: opened.len }),
        };
        let version = word(4);
        within("header", 0, LEN_2 as u64)?;
        let (least, header_len) = match version {
            2 => (LEN_2, LEN_2 as u32),
            3 => (LEN_3, word(100)),
            version => return Err(ImageProblem::Qcow2Version { version }),
        };
        within("header", 0, least as u64)?;
        let sane =
            |field, value: u64, holds: bool| if holds { Ok(()) } else { Err(ImageProblem::Damaged { field, value }) };
        let cluster_bits = word(20);
        sane("cluster_bits", cluster_bits.into(), CLUSTER_BITS.contains(&cluster_bits))?;
        let cluster = 1 << cluster_bits;
        sane("header_length", header_len.into(), (least as u64..=cluster).contains(&header_len.into()))?;
        match word(32) {
            0 => {}
            1 | 2 => return Err(ImageProblem::Encrypted),
            method => return Err(ImageProblem::Damaged { field: "crypt_method", value: method.into() }),
        }
        let features = if version == 3 { long(72) } else { 0 };
        if let Some((_, feature, remedy)) = FEATURES.iter().find(|(bit, ..)| features & bit != 0) {
            return Err(ImageProblem::Feature { feature, remedy });
        }
        if features != 0 {
            return Err(ImageProblem::UnknownFeatures { bits: features });
        }
        let size = long(24);
        sane("size", size, size != 0 && size.is_multiple_of(512) && size <= i64::MAX as u64)?;
        within("table of clusters", long(40), u64::from(word(36)) * 8)?;
        within("table of reference counts", long(48), u64::from(word(56)) << cluster_bits)?;
        let aligned = |offset: u64| offset != 0 && offset.is_multiple_of(cluster);
        sane("l1_table_offset", long(40), aligned(long(40)))?;
        sane("refcount_table_offset", long(48), aligned(long(48)))?;
        sane("refcount_table_clusters", word(56).into(), word(56) != 0)?;
        if !opened.read_only {
            let mut block = [0; 8];
            opened.read_up_to(&mut block, long(48))?;
            let block = u64::from_be_bytes(block);
            sane("refcount_table[0]", block, aligned(block))?;
            clear_autoclear(opened, version, long(AUTOCLEAR as usize))?;
        }
        if long(8) == 0 {
            return Ok(Self { cluster, backing: None });
        }
        let (at, len) = (long(8), word(16));
        sane("backing_file_size", len.into(), (1..=NAME_MAX).contains(&len))?;
        sane("backing_file_offset", at, at.checked_add(len.into()).is_some_and(|end| end <= cluster))?;
        within("name of the backing file", at, len.into())?;
        let mut name = vec![0; len as usize];
        opened.read_up_to(&mut name, at)?;
        let name = String::from_utf8(name)
            .map_err(|name| ImageProblem::BackingName(String::from_utf8_lossy(name.as_bytes()).into_owned()))?;
        Ok(Self { cluster, backing: Some(Backing { name, format: backing_format(opened, header_len, cluster)? }) })
    }
}

/// Clears the features that hold only while nobody writes who doesn't know them.
fn clear_autoclear(opened: &Opened, version: u32, features: u64) -> Result<(), ImageProblem> {
    if version == 2 || features == 0 {
        return Ok(());
    }
    let done = opened.file.write_all_at(&[0; 8], AUTOCLEAR);
    done.map_err(|source| ImageProblem::Io { action: super::WRITE, source })
}

/// The backing file's format, by its header extension.
fn backing_format(opened: &Opened, header_len: u32, cluster: u64) -> Result<Option<String>, ImageProblem> {
    let mut at = u64::from(header_len);
    while at + 8 <= cluster.min(opened.len) {
        let mut head = [0; 8];
        opened.read_up_to(&mut head, at)?;
        let [kind, len] = [0, 4].map(|n| u32::from_be_bytes([head[n], head[n + 1], head[n + 2], head[n + 3]]));
        if kind == EXTENSION_END || u64::from(len) > cluster.min(opened.len) - (at + 8) {
            break;
        }
        if kind == EXTENSION_BACKING_FORMAT {
            let mut format = vec![0; len as usize];
            opened.read_up_to(&mut format, at + 8)?;
            return Ok(Some(String::from_utf8_lossy(&format).into_owned()));
        }
        at += 8 + u64::from(len.next_multiple_of(8));
    }
    Ok(None)
}
