//! Thin images on a file system without room. A program of its own: it starts another process, which for a moment holds the locks of
//! every image that is open.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, Storage, StorageCreateOptions};
use soc_vmm::block::{BlockBackend, ImageSpec, open};

/// Blocks that files may have in the other process: of 512 bytes or 1024, which depends on the shell.
const LIMIT: u64 = 256;
/// By which the other process is told the image.
const IMAGE: &str = "OUTBOARD_TEST_IMAGE";

/// What the other process does: it writes clusters until there is no room, and says how many went.
fn write_until_there_is_no_room(path: &Path) {
    let image = opened(path);
    let mut written = 0;
    let error = loop {
        match image.write_at(&[written as u8 + 1; 4096], written * 4096) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(error.is_no_space(), "{error:?}");
    assert!(error.to_string().contains(&path.display().to_string()));
    // What is there already needs no room: it is read, written again and made durable.
    image.write_at(&[0xff; 4096], 0).unwrap();
    image.flush().unwrap();
    assert_eq!(bytes(&*image, (written - 1) * 4096, 4096), [written as u8; 4096]);
    println!("written={written}");
}

#[test]
fn a_thin_image_without_room_keeps_what_it_took() {
    if let Some(path) = std::env::var_os(IMAGE) {
        return write_until_there_is_no_room(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["disk.qcow2", "disk.img"] {
        let path = dir.path().join(name);
        match name {
            "disk.img" => std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap(),
            _ => create_qcow2(&path),
        }
        // A limit of the process's, with the signal ignored, is an error of write(2) as a full file system is.
        let mut other = Command::new("sh");
        other.args(["-c", &format!("trap '' XFSZ; ulimit -f {LIMIT}; exec \"$0\" \"$@\"")]);
        other.arg(std::env::current_exe().unwrap());
        other.args(["--exact", "a_thin_image_without_room_keeps_what_it_took", "--nocapture"]);
        let output = other.env(IMAGE, &path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let written = text.split("written=").nth(1).unwrap().split_whitespace().next().unwrap();
        let written: u64 = written.parse().unwrap();
        assert!((8..256).contains(&written), "{written}");
        // With room again it goes on as if nothing had been.
        let image = opened(&path);
        assert_eq!(bytes(&*image, 0, 4096), [0xff; 4096]);
        for cluster in 1..written {
            assert_eq!(bytes(&*image, cluster * 4096, 4096), [cluster as u8 + 1; 4096], "{name}: cluster {cluster}");
        }
        for cluster in written..256 {
            image.write_at(&[0x33; 4096], cluster * 4096).unwrap();
        }
        image.flush().unwrap();
        drop(image);
        let image = opened(&path);
        assert_eq!(bytes(&*image, (written - 1) * 4096, 4096), [written as u8; 4096]);
        let rest = (256 - written) as usize * 4096;
        assert_eq!(bytes(&*image, written * 4096, rest), vec![0x33; rest]);
    }
}

fn opened(path: &Path) -> Arc<dyn BlockBackend> {
    open(&ImageSpec::new(path)).unwrap()
}

fn bytes(image: &dyn BlockBackend, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image.read_at(&mut bytes, offset).unwrap();
    bytes
}

fn create_qcow2(path: &Path) {
    let file = File::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let builder = Qcow2::<File, FormatAccess<File>>::create_builder(file);
    builder.size(1 << 20).cluster_size(4096).create().unwrap();
}
