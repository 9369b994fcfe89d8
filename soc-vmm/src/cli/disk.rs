//! The values of `--disk` and `--cdrom`.

use std::str::FromStr;

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::values::{ValueError, limit, wrong};
use super::vhost::{AnyDisk, AnyNet, FsSpec};
use crate::block::{Aio, ImageFormat, ImageSpec};
use crate::slots::{ID_MAX, is_name};
use crate::virtio::block::{ErrorPolicy, MAX_QUEUES, OnError};
use crate::virtio::{Rate, RateLimits};

/// `--disk file=F[,format=raw|qcow2][,readonly=on|off][,id=I][,queues=N][,cache=C][,aio=A][,iops=N[,iops_max=N]][,bps=N[,bps_max=N]]`
/// `[,werror=P][,rerror=P]`: each once, in any order. As on QEMU's command line, `,,` in a value is a comma.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its image.
    pub image: ImageSpec,
    /// The name that it is known by afterwards.
    pub id: Option<String>,
    /// How the device serves it.
    pub tuning: DiskTuning,
}

/// How a disk's device works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskTuning {
    /// Queues.
    pub queues: u16,
    /// What the guest has written is durable after a flush; else at once.
    pub write_cache: bool,
    /// How its image is read and written.
    pub aio: Aio,
    /// What it may do in a time.
    pub limits: RateLimits,
    /// What errors of its image come to.
    pub on_error: ErrorPolicy,
}

impl Default for DiskTuning {
    fn default() -> Self {
        Self {
            queues: 1,
            write_cache: true,
            aio: Aio::default(),
            limits: RateLimits::default(),
            on_error: ErrorPolicy::default(),
        }
    }
}

impl FromStr for DiskSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let mut options = Options::default();
        for option in split(s) {
            let (name, value) = option.split_once('=').unwrap_or((&option, ""));
            let Some(place) = NAMES.iter().position(|known| *known == name).map(|at| &mut options.0[at]) else {
                return wrong(format!("'{option}': a disk has {}", NAMES.join("=, ") + "="));
            };
            if place.replace(value.into()).is_some() {
                return wrong(format!("'{option}': {name}= is there twice"));
            }
        }
        let Some(path) = options.get("file") else { return wrong("a disk needs file=FILE") };
        if path.is_empty() {
            return wrong("file= needs the path of an image");
        }
        let formats = [("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2)];
        // Whether the page cache is passed by, and whether the guest is to flush.
        let caches = [
            ("writeback", (false, true)),
            ("writethrough", (false, false)),
            ("none", (true, true)),
            ("directsync", (true, false)),
        ];
        let (direct, write_cache) = options.word("cache", &caches)?.unwrap_or((false, true));
        let image = ImageSpec {
            path: path.into(),
            format: options.word("format", &formats)?,
            read_only: options.word("readonly", &[("on", true), ("off", false)])?.unwrap_or(false),
            direct,
            unclaimed: false,
        };
        let errors = [("report", OnError::Report), ("stop", OnError::Stop), ("ignore", OnError::Ignore)];
        let write_errors = [&errors[..], &[("enospc", OnError::Enospc)]].concat();
        let default = DiskTuning::default();
        let tuning = DiskTuning {
            queues: options.number("queues", MAX_QUEUES.into())?.map_or(default.queues, |queues| queues as u16),
            write_cache,
            aio: options.word("aio", &[("io_uring", Aio::IoUring), ("threads", Aio::Threads)])?.unwrap_or_default(),
            limits: RateLimits {
                operations: options.rate("iops", "iops_max")?,
                bytes: options.rate("bps", "bps_max")?,
            },
            on_error: ErrorPolicy {
                read: options.word("rerror", &errors)?.unwrap_or(default.on_error.read),
                write: options.word("werror", &write_errors)?.unwrap_or(default.on_error.write),
            },
        };
        let id = options.get("id").map(parse_id).transpose()?;
        Ok(Self { image, id, tuning })
    }
}

/// Options of a disk.
const NAMES: [&str; 13] = [
    "file", "format", "readonly", "id", "queues", "cache", "aio", "iops", "iops_max", "bps", "bps_max", "werror",
    "rerror",
];
/// The values, in the order of their names.
#[derive(Default)]
struct Options([Option<String>; NAMES.len()]);

impl Options {
    fn get(&self, name: &str) -> Option<&str> {
        NAMES.iter().position(|known| *known == name).and_then(|at| self.0[at].as_deref())
    }

    /// What a word stands for.
    fn word<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, ValueError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == value) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                wrong(format!("{name}={value}: it is one of {}", words.join(", ")))
            }
        }
    }

    /// A number from 1 to `most`.
    fn number(&self, name: &str, most: u64) -> Result<Option<u64>, ValueError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let digits = value.bytes().all(|byte| byte.is_ascii_digit());
        match value.parse() {
            Ok(number) if digits && (1..=most).contains(&number) => Ok(Some(number)),
            _ => wrong(format!("{name}={value}: it is a number from 1 to {most}")),
        }
    }

    /// A limit, and how much of it may come at once.
    fn rate(&self, name: &str, burst_name: &str) -> Result<Option<Rate>, ValueError> {
        let number = |name| self.get(name).map(|value| limit(name, value)).transpose();
        match (number(name)?, number(burst_name)?) {
            (Some(per_second), Some(burst)) => Ok(Some(Rate { per_second, burst })),
            (Some(per_second), None) => Ok(Some(Rate::new(per_second))),
            (None, Some(_)) => wrong(format!("{burst_name}= needs {name}=, of which it is the burst")),
            (None, None) => Ok(None),
        }
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

/// `Ok` if every device has an id of its own, and every disk a serial number. `others`: ids of devices that the machine names.
pub(super) fn check_ids<'a>(
    disks: &[AnyDisk],
    nets: &[AnyNet],
    file_systems: &[FsSpec],
    others: impl Iterator<Item = &'a str>,
) -> Result<(), String> {
    let ids: Vec<String> = disks.iter().enumerate().map(|(index, disk)| disk.id_at(index)).collect();
    let nets = nets.iter().enumerate().map(|(index, net)| net.id_at(index));
    let file_systems = file_systems.iter().enumerate().map(|(index, fs)| fs.id_at(index));
    let all: Vec<String> =
        ids.iter().cloned().chain(nets).chain(file_systems).chain(others.map(str::to_owned)).collect();
    let twice = (0..all.len()).find(|&n| all[..n].contains(&all[n]));
    if let Some(n) = twice {
        return Err(format!(
            "id={} is there twice: give each device its own (disks have disk0, …, interfaces net0, …, file systems fs0, …, and others rng0, serial0, vsock0, balloon0)",
            all[n]
        ));
    }
    // Other processes' disks have serial numbers of their own.
    let ours = disks.iter().zip(ids).filter(|(disk, _)| matches!(disk, AnyDisk::Image(_)));
    let disks: Vec<String> = ours.map(|(_, id)| id).collect();
    // Ids are ASCII.
    let serial = |id: &String| id.chars().take(VIRTIO_BLK_ID_BYTES as usize).collect::<String>();
    let serials: Vec<String> = disks.iter().map(serial).collect();
    (0..disks.len()).find(|&n| serials[..n].contains(&serials[n])).map_or(Ok(()), |n| {
        let why = "would be the serial number of another disk too: ids differ in their first";
        Err(format!("id={}: '{}' {why} {VIRTIO_BLK_ID_BYTES} characters", disks[n], serials[n]))
    })
}

/// An id as QEMU and libvirt know them: a letter, then letters, digits and `-._`.
pub(super) fn parse_id(s: &str) -> Result<String, ValueError> {
    if s.len() > ID_MAX {
        wrong(format!("id={s:.20}… is too long: an id has at most {ID_MAX} characters"))
    } else if is_name(s) {
        Ok(s.into())
    } else {
        wrong(format!("id={s}: an id is a letter, then letters, digits and any of '-', '.', '_'"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn disks_in_every_notation() {
        let disk: DiskSpec = "file=/a.img".parse().unwrap();
        assert_eq!(disk, DiskSpec { image: ImageSpec::new("/a.img"), id: None, tuning: DiskTuning::default() });
        let disk: DiskSpec =
            "file=a,cache=none,aio=threads,queues=4,iops=100,bps=1000,bps_max=7,werror=stop,rerror=ignore"
                .parse()
                .unwrap();
        assert_eq!(disk.image, ImageSpec { direct: true, ..ImageSpec::new("a") });
        let limits = RateLimits {
            operations: Some(Rate { per_second: 100, burst: 10 }),
            bytes: Some(Rate { per_second: 1000, burst: 7 }),
        };
        let on_error = ErrorPolicy { read: OnError::Ignore, write: OnError::Stop };
        let tuning = DiskTuning { queues: 4, write_cache: true, aio: Aio::Threads, limits, on_error };
        assert_eq!(disk.tuning, tuning);
        for (cache, direct, write_cache) in [
            ("writeback", false, true),
            ("writethrough", false, false),
            ("none", true, true),
            ("directsync", true, false),
        ] {
            let disk: DiskSpec = format!("file=a,cache={cache}").parse().unwrap();
            assert_eq!((disk.image.direct, disk.tuning.write_cache), (direct, write_cache), "{cache}");
        }
        let disk: DiskSpec = "id=d-0,readonly=on,format=qcow2,file=a=b,,c".parse().unwrap();
        assert_eq!(disk.image, ImageSpec { format: Some(ImageFormat::Qcow2), ..ImageSpec::read_only("a=b,c") });
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
            "file=a,cache=unsafe",
            "file=a,aio=native",
            "file=a,queues=0",
            "file=a,queues=65",
            "file=a,queues=+1",
            "file=a,iops=0",
            "file=a,iops=99999999999999999999",
            "file=a,bps_max=1",
            "file=a,rerror=enospc",
            "file=a,werror=retry",
            "file=a,id=x,id=x",
            "format=raw",
            &format!("file=a,id={}", "i".repeat(65)),
        ] {
            assert!(bad.parse::<DiskSpec>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn each_device_has_an_id_and_each_disk_a_serial_number() {
        let check = |disks: &[&str], nets: &[&str]| {
            let disks: Vec<AnyDisk> = disks.iter().map(|id| format!("file=a{id}").parse().unwrap()).collect();
            let nets: Vec<AnyNet> = nets.iter().map(|id| format!("stream=s{id}").parse().unwrap()).collect();
            let file_systems = ["vhost-user=s,tag=t".parse().unwrap()];
            check_ids(&disks, &nets, &file_systems, ["rng0"].into_iter())
        };
        assert_eq!(check(&["", ",id=disk0x", ",id=disk-of-the-guest-1", ",id=DISK0"], &["", ",id=n"]), Ok(()));
        for (disks, nets, words) in [
            (&[",id=a", ",id=a"][..], &[][..], "id=a is there twice"),
            (&[",id=a"], &[",id=a"], "id=a is there twice"),
            (&["", ",id=disk0"], &[], "id=disk0 is there twice"),
            (&[",id=disk1", ""], &[], "id=disk1 is there twice"),
            (&[",id=net0"], &[""], "id=net0 is there twice"),
            (&[",id=rng0"], &[], "id=rng0 is there twice"),
            (&[",id=fs0"], &[], "id=fs0 is there twice"),
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
