//! Who may use an image at the same time.

use std::fs::File;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, flock};

use super::*;

const WRITTEN: &str = "it is in use: another program or disk writes it: stop that one";
const READ: &str = "it is in use: another program or disk reads it and needs it unchanged: say readonly=on";

#[test]
fn who_writes_an_image_has_it_for_himself() {
    let dir = Dir::new();
    let raw = dir.raw("raw", &[1; 4096]);
    let qcow2 = dir.qcow2("disk.qcow2", 1 << 20, None);
    for path in [&raw, &qcow2] {
        let link = path.with_extension("link.qcow2");
        std::os::unix::fs::symlink(path, &link).unwrap();
        let format = Some(if path == &raw { ImageFormat::Raw } else { ImageFormat::Qcow2 });
        let with = |path: &Path, read_only| ImageSpec {
            path: path.into(),
            format,
            read_only,
            direct: false,
            unclaimed: false,
        };
        let image = opened(path);
        for read_only in [false, true] {
            for other in [path, &link] {
                let text = refusal(&with(other, read_only));
                assert!(text.contains(&format!("{}: {WRITTEN}", other.display())), "{text}");
            }
        }
        drop(image);
        let readers = [open(&with(path, true)).unwrap(), open(&with(&link, true)).unwrap()];
        let text = refusal(&with(path, false));
        assert!(text.contains(READ), "{text}");
        drop(readers);
        opened(path);
    }
}

#[test]
fn a_backing_file_is_kept_as_it_is() {
    let dir = Dir::new();
    let base = dir.raw("base", &[1; 4096]);
    let middle = dir.qcow2("middle.qcow2", 4096, Some(("base", "raw")));
    let [one, two] = ["one.qcow2", "two.qcow2"].map(|name| dir.qcow2(name, 4096, Some(("middle.qcow2", "qcow2"))));
    let overlays = [opened(&one), opened(&two)];
    for path in [&base, &middle] {
        let text = refusal(&ImageSpec::new(path));
        assert!(text.contains(READ), "{text}");
        open(&ImageSpec::read_only(path)).unwrap();
    }
    drop(overlays);
    let image = opened(&base);
    let text = refusal(&ImageSpec::new(&one));
    assert!(text.contains(&format!("its backing file {}: {WRITTEN}", base.display())), "{text}");
    drop(image);
    opened(&one);
}

/// A byte of a file, as another program sees it or has it.
fn byte(kind: i32, byte: i64) -> flock {
    flock { l_type: kind as i16, l_whence: 0, l_start: byte, l_len: 1, l_pid: 0 }
}

#[test]
fn the_locks_are_those_of_qemu() {
    let dir = Dir::new();
    let path = dir.raw("disk", &[1; 512]);
    let other = File::open(&path).unwrap();
    let held = || {
        let is_held = |at: &i64| {
            let mut asked = byte(F_WRLCK, *at);
            fcntl(&other, FcntlArg::F_OFD_GETLK(&mut asked)).unwrap();
            i32::from(asked.l_type) == F_RDLCK
        };
        (0..400).filter(is_held).collect::<Vec<_>>()
    };
    assert!(held().is_empty());
    let image = opened(&path);
    assert_eq!(held(), [100, 101, 103, 201, 203]);
    drop(image);
    let image = open(&ImageSpec::read_only(&path)).unwrap();
    assert_eq!(held(), [100, 201, 203]);
    drop(image);
    assert!(held().is_empty());
    // What another program does or forbids: whether a disk that is written, one that is read goes with it.
    for (at, words) in [
        (100, [None, None]),
        (101, [Some(WRITTEN); 2]),
        (102, [None, None]),
        (103, [Some(WRITTEN); 2]),
        (200, [Some(READ), Some(WRITTEN)]),
        (201, [Some(READ), None]),
        (202, [None, None]),
        (203, [Some(READ), None]),
    ] {
        fcntl(&other, FcntlArg::F_OFD_SETLK(&byte(F_RDLCK, at))).unwrap();
        for (spec, words) in [ImageSpec::new(&path), ImageSpec::read_only(&path)].into_iter().zip(words) {
            match words {
                Some(words) => assert!(refusal(&spec).contains(words), "{at}"),
                None => drop(open_anew(&spec)),
            }
        }
        fcntl(&other, FcntlArg::F_OFD_SETLK(&byte(F_UNLCK, at))).unwrap();
    }
}
