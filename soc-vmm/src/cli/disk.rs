//! The values of `--disk` and `--cdrom`.

use std::path::PathBuf;
use std::str::FromStr;

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::net::NetSpec;
use super::values::{ValueError, wrong};
use crate::block::{ImageFormat, ImageSpec};

/// `--disk file=F[,format=raw|qcow2][,readonly=on|off][,id=I]`: each once, in any order. As on QEMU's command line, `,,` in a value
/// is a comma.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its image.
    pub image: ImageSpec,
    /// The name that it is known by afterwards.
    pub id: Option<String>,
}

impl FromStr for DiskSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let (mut file, mut format, mut read_only, mut id) = (None, None, None, None);
        for option in split(s) {
            let (name, value) = option.split_once('=').unwrap_or((&option, ""));
            match name {
                "file" if file.is_none() && !value.is_empty() => file = Some(PathBuf::from(value)),
                "file" if file.is_none() => return wrong("file= needs the path of an image"),
                "format" if format.is_none() => match value {
                    "raw" => format = Some(ImageFormat::Raw),
                    "qcow2" => format = Some(ImageFormat::Qcow2),
                    other => return wrong(format!("format={other}: images are raw or qcow2")),
                },
                "readonly" if read_only.is_none() => match value {
                    "on" => read_only = Some(true),
                    "off" => read_only = Some(false),
                    other => return wrong(format!("readonly={other}: write on or off")),
                },
                "id" if id.is_none() => id = Some(parse_id(value)?),
                _ => {
                    return wrong(format!(
                        "'{option}': write file=FILE[,format=raw|qcow2][,readonly=on|off][,id=ID], each once"
                    ));
                }
            }
        }
        let Some(path) = file else { return wrong("a disk needs file=FILE") };
        Ok(Self { image: ImageSpec { path, format, read_only: read_only.unwrap_or(false) }, id })
    }
}

impl DiskSpec {
    /// Its id, or the one that it has as the disk of that place on the command line.
    pub(crate) fn id_at(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{index}"))
    }
}

/// `--cdrom F`: an image that is only read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CdromSpec {
    /// The medium.
    pub image: ImageSpec,
}

impl FromStr for CdromSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        if s.is_empty() { wrong("give the path of an image") } else { Ok(Self { image: ImageSpec::read_only(s) }) }
    }
}

/// The parts between single commas, a double one being one of a part.
pub(super) fn split(s: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = s.chars().peekable();
    while let Some(c) = chars.next() {
        match parts.last_mut() {
            Some(last) if c != ',' || chars.next_if_eq(&',').is_some() => last.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts
}

/// `Ok` if every device has an id of its own, and every disk a serial number.
pub(super) fn check_ids(disks: &[DiskSpec], nets: &[NetSpec]) -> Result<(), String> {
    let disks: Vec<String> = disks.iter().enumerate().map(|(index, disk)| disk.id_at(index)).collect();
    let nets = nets.iter().enumerate().map(|(index, net)| net.id_at(index));
    let all: Vec<String> = disks.iter().cloned().chain(nets).collect();
    let twice = (0..all.len()).find(|&n| all[..n].contains(&all[n]));
    if let Some(n) = twice {
        return Err(format!(
            "id={} is there twice: give each device its own (disks have disk0, …, interfaces net0, …)",
            all[n]
        ));
    }
    // Ids are ASCII.
    let serial = |id: &String| id.chars().take(VIRTIO_BLK_ID_BYTES as usize).collect::<String>();
    let serials: Vec<String> = disks.iter().map(serial).collect();
    (0..disks.len()).find(|&n| serials[..n].contains(&serials[n])).map_or(Ok(()), |n| {
        let why = "would be the serial number of another disk too: ids differ in their first";
        Err(format!("id={}: '{}' {why} {VIRTIO_BLK_ID_BYTES} characters", disks[n], serials[n]))
    })
}

/// Most characters of an id.
const ID_MAX: usize = 64;

/// An id as QEMU and libvirt know them: a letter, then letters, digits and `-._`.
pub(super) fn parse_id(s: &str) -> Result<String, ValueError> {
    let tail = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if s.len() > ID_MAX {
        wrong(format!("id={s:.20}… is too long: an id has at most {ID_MAX} characters"))
    } else if s.starts_with(|c: char| c.is_ascii_alphabetic()) && s.chars().all(tail) {
        Ok(s.into())
    } else {
        wrong(format!("id={s}: an id is a letter, then letters, digits and any of '-', '.', '_'"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn disks_in_every_notation() {
        let disk: DiskSpec = "file=/a.img".parse().unwrap();
        assert_eq!(disk, DiskSpec { image: ImageSpec::new("/a.img"), id: None });
        let disk: DiskSpec = "id=d-0,readonly=on,format=qcow2,file=a=b,,c".parse().unwrap();
        assert_eq!(disk.image, ImageSpec { path: "a=b,c".into(), format: Some(ImageFormat::Qcow2), read_only: true });
        assert_eq!(disk.id.as_deref(), Some("d-0"));
        let long = "i".repeat(64);
        assert_eq!(format!("file=a,id={long}").parse::<DiskSpec>().unwrap().id, Some(long));
        for bad in [
            "",
            "/a.img",
            "file=",
            "file",
            "file=a,",
            "file=a,file=b",
            "file=a,format=vmdk",
            "file=a,format=",
            "file=a,readonly",
            "file=a,readonly=yes",
            "file=a,id=",
            "file=a,id=0",
            "file=a,id=a b",
            "file=a,cache=none",
            "format=raw",
            &format!("file=a,id={}", "i".repeat(65)),
        ] {
            assert!(bad.parse::<DiskSpec>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn each_device_has_an_id_and_each_disk_a_serial_number() {
        let check = |disks: &[&str], nets: &[&str]| {
            let disks: Vec<DiskSpec> = disks.iter().map(|id| format!("file=a{id}").parse().unwrap()).collect();
            let nets: Vec<NetSpec> = nets.iter().map(|id| format!("stream=s{id}").parse().unwrap()).collect();
            check_ids(&disks, &nets)
        };
        assert_eq!(check(&["", ",id=disk0x", ",id=disk-of-the-guest-1", ",id=DISK0"], &["", ",id=n"]), Ok(()));
        for (disks, nets, words) in [
            (&[",id=a", ",id=a"][..], &[][..], "id=a is there twice"),
            (&[",id=a"], &[",id=a"], "id=a is there twice"),
            (&["", ",id=disk0"], &[], "id=disk0 is there twice"),
            (&[",id=disk1", ""], &[], "id=disk1 is there twice"),
            (&[",id=net0"], &[""], "id=net0 is there twice"),
            (&[",id=the-disk-of-the-guest-1", ",id=the-disk-of-the-guest-2"], &[], "'the-disk-of-the-gues' would be"),
        ] {
            let why = check(disks, nets).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn a_cd_is_a_path() {
        assert_eq!("a,b.iso".parse(), Ok(CdromSpec { image: ImageSpec::read_only("a,b.iso") }));
        assert!("".parse::<CdromSpec>().is_err());
    }

    proptest! {
        #[test]
        fn a_path_reads_back_with_its_commas_doubled(path in "[a-z,=/]{1,12}") {
            let disk: DiskSpec = format!("id=x,file={},format=raw", path.replace(',', ",,")).parse().unwrap();
            prop_assert_eq!(disk.image.path, PathBuf::from(path));
        }

        #[test]
        fn any_text_is_a_disk_or_an_error(text in ".{0,24}") {
            let _ = (text.parse::<DiskSpec>(), text.parse::<CdromSpec>());
        }
    }
}
