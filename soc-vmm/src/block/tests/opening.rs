//! What is refused, and in which words.

use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn what_holds_no_disk_is_refused_at_once() {
    let dir = Dir::new();
    nix::unistd::mkfifo(&dir.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    dir.raw("empty", &[]);
    let _listener = std::os::unix::net::UnixListener::bind(dir.path("socket")).unwrap();
    for (path, words) in [
        (dir.path("missing"), "can't open it (check its path and permissions): No such file"),
        (dir.0.path().into(), "it is a directory: give a file"),
        (dir.path("fifo"), "it is a FIFO"),
        (dir.path("socket"), "can't open it"),
        ("/dev/zero".into(), "it is a character device"),
        (dir.path("empty"), "it is empty"),
    ] {
        for spec in [ImageSpec::new(&path), ImageSpec::read_only(&path)] {
            let text = refusal(&spec);
            assert!(text.starts_with(&format!("can't use disk image {}: ", path.display())), "{text}");
            assert!(text.contains(words), "{text}");
        }
    }
}

#[test]
fn an_image_that_cannot_be_written_says_what_to_do() {
    if nix::unistd::geteuid().is_root() {
        // Nothing keeps root from writing a file; a running program does. (This one may run under an emulator.)
        let dir = Dir::new();
        let program = dir.0.path().canonicalize().unwrap().join("sleep");
        std::fs::copy("/bin/sleep", &program).unwrap();
        let mut running = std::process::Command::new(&program).arg("60").spawn().unwrap();
        // Under an emulator a start doesn't wait until the program runs.
        let link = format!("/proc/{}/exe", running.id());
        while std::fs::read_link(&link).unwrap() != program {
            std::thread::yield_now();
        }
        let text = refusal(&ImageSpec::new(&program));
        running.kill().and_then(|()| running.wait()).unwrap();
        assert!(text.contains("or say readonly=on"), "{text}");
        return;
    }
    let dir = Dir::new();
    let path = dir.raw("disk", &[0; 512]);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
    assert!(refusal(&ImageSpec::new(&path)).contains("or say readonly=on"));
    open(&ImageSpec::read_only(&path)).unwrap();
}

#[test]
fn content_never_decides_the_format() {
    let dir = Dir::new();
    let qcow2 = dir.qcow2("disk.qcow2", 1 << 20, None);
    let other = dir.path("disk.img");
    std::fs::copy(&qcow2, &other).unwrap();
    assert_eq!(opened(&qcow2).size(), 1 << 20);
    assert!(refusal(&ImageSpec::new(&other)).contains("say format=qcow2, or format=raw"));
    let with = |format| ImageSpec { format: Some(format), ..ImageSpec::new(&other) };
    assert_eq!(open(&with(ImageFormat::Qcow2)).unwrap().size(), 1 << 20);
    let len = std::fs::metadata(&other).unwrap().len();
    assert_eq!(open(&with(ImageFormat::Raw)).unwrap().size(), len.next_multiple_of(512));
    assert!(refusal(&ImageSpec::new(dir.raw("raw.qcow2", &[0; 4096]))).contains("it has no qcow2 header"));
}

/// A good image with bytes put over its own.
fn changed(changes: &[(usize, &[u8])]) -> String {
    let dir = Dir::new();
    let path = dir.qcow2("disk.qcow2", 1 << 20, None);
    let mut bytes = std::fs::read(&path).unwrap();
    for (at, new) in changes {
        bytes[*at..at + new.len()].copy_from_slice(new);
    }
    std::fs::write(&path, bytes).unwrap();
    refusal(&ImageSpec::new(&path))
}

#[test]
fn a_bad_qcow2_header_is_named() {
    let bit = |n: u32| (1u64 << n).to_be_bytes();
    for (at, new, words) in [
        (4, &[0, 0, 0, 1][..], "of version 1"),
        (4, &[0, 0, 0, 4], "of version 4"),
        (20, &[0, 0, 0, 8], "(cluster_bits is 0x8)"),
        (20, &[0, 0, 0, 22], "(cluster_bits is 0x16)"),
        (20, &[0xff; 4], "(cluster_bits is 0xffffffff)"),
        (24, &[0; 8], "(size is 0x0)"),
        (24, &[0xff; 8], "(size is 0xffffffffffffffff)"),
        (32, &[0, 0, 0, 1], "it is encrypted"),
        (32, &[0, 0, 0, 2], "it is encrypted"),
        (32, &[0, 0, 0, 3], "(crypt_method is 0x3)"),
        (36, &[0xff; 4], "it is truncated: its table of clusters"),
        (40, &[0xff; 8], "it is truncated: its table of clusters"),
        (48, &[0x7f; 8], "it is truncated: its table of reference counts"),
        (100, &[0, 0, 0xff, 0xff], "(header_length is 0xffff)"),
        (72, &bit(0), "it was not closed in order: repair it"),
        (72, &bit(1), "it is marked as corrupt"),
        (72, &bit(2), "it keeps its data in another file"),
        (72, &bit(4), "it has extended L2 entries"),
        (72, &bit(60), "features that are not known here (bits 0x1000000000000000)"),
        (40, &[0, 0, 0, 0, 0, 0, 0, 1], "(l1_table_offset is 0x1)"),
        (48, &[0; 8], "(refcount_table_offset is 0x0)"),
        (56, &[0; 4], "(refcount_table_clusters is 0x0)"),
    ] {
        let text = changed(&[(at, new)]);
        assert!(text.contains(words), "{text}");
    }
    for len in 0..512 {
        let dir = Dir::new();
        let path = dir.qcow2("disk.qcow2", 1 << 20, None);
        std::fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        let text = refusal(&ImageSpec::new(&path));
        assert!(
            text.contains(
                ["it is truncated", "it has no qcow2", "it is empty"][match len {
                    0 => 2,
                    1..4 => 1,
                    _ => 0,
                }]
            ),
            "{len}: {text}"
        );
    }
}

#[test]
fn a_bad_backing_file_is_named() {
    let dir = Dir::new();
    let top = |name: &str, format: &str| {
        let path = dir.qcow2("top.qcow2", 1 << 20, Some((name, format)));
        refusal(&ImageSpec::new(path))
    };
    let base = dir.path("base");
    let text = top("base", "raw");
    let named = format!("{}: its backing file {}: can't open it", dir.path("top.qcow2").display(), base.display());
    assert!(text.contains(&named), "{text}");
    assert!(top("nbd://host/x", "raw").contains("'nbd://host/x' is not a path"));
    assert!(top("json:{}", "raw").contains("is not a path"));
    dir.raw("base", &[1; 512]);
    assert!(top("base", "vmdk").contains("has format 'vmdk'"));
    assert!(top("base", "qcow2").contains("it has no qcow2 header"));
    assert!(top("top.qcow2", "qcow2").contains("it is also further up in the chain"));
    std::os::unix::fs::symlink(dir.path("top.qcow2"), dir.path("alias")).unwrap();
    dir.qcow2("middle", 1 << 20, Some(("./alias", "qcow2")));
    assert!(top("middle", "qcow2").contains("it is also further up in the chain"));
    nix::unistd::mkfifo(&dir.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(top("fifo", "raw").contains("it is a FIFO"));
    // Its format is not said, and a guess would be dangerous.
    dir.qcow2("unsaid", 1 << 20, None);
    assert!(top("unsaid", "").contains("it begins like a qcow2 image"));
}

#[test]
fn a_chain_has_an_end() {
    let dir = Dir::new();
    let name = |n: usize| format!("{n}.qcow2");
    dir.qcow2(&name(0), 1 << 16, None);
    for n in 1..=64 {
        dir.qcow2(&name(n), 1 << 16, Some((&name(n - 1), "qcow2")));
    }
    // Not to be written: another test's child may have a copy of it for a moment, and with it the lock.
    let longest = ImageSpec { format: Some(ImageFormat::Qcow2), ..ImageSpec::read_only(dir.path(&name(63))) };
    assert_eq!(bytes(&*crate::block::open(&longest).unwrap(), 0, 512), [0; 512]);
    let (top, last) = (dir.path(&name(64)), dir.path(&name(0)));
    let whole = format!("can't use disk image {}: its backing file {}: it is the 65th", top.display(), last.display());
    let text = refusal(&ImageSpec::new(top));
    assert!(text.starts_with(&whole), "{text}");
}

/// A file as a block device, until the end of the test.
struct LoopDevice(PathBuf);

impl LoopDevice {
    /// None where this user can't have one.
    fn new(options: &[&str], file: &Path) -> Option<Self> {
        let made = std::process::Command::new("losetup").args(["--find", "--show"]).args(options).arg(file).output();
        let made = made.ok().filter(|made| made.status.success())?;
        Some(Self(String::from_utf8(made.stdout).unwrap().trim_end().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_that_takes_no_writes_is_only_read() {
    let dir = Dir::new();
    let file = dir.raw("disk", &[1; 4096]);
    let (Some(fixed), Some(free)) = (LoopDevice::new(&["--read-only"], &file), LoopDevice::new(&[], &file)) else {
        return testbed::skip("a_block_device_that_takes_no_writes_is_only_read", "loop devices can't be had here");
    };
    let text = refusal(&ImageSpec::new(&fixed.0));
    assert!(text.contains("or say readonly=on): "), "{text}");
    assert_eq!(bytes(&*open(&ImageSpec::read_only(&fixed.0)).unwrap(), 0, 512), [1; 512]);
    opened(&free.0).write_at(&[2; 512], 0).unwrap();
}
