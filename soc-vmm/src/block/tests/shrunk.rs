//! Files that somebody cuts while they are used.

use super::*;

/// Cuts a file to `len` bytes.
fn cut(path: &Path, len: u64) {
    std::fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

fn told(result: Result<(), BlockError>) -> String {
    with_causes(&result.expect_err("nothing was missed"))
}

const WHY: &str = "it is shorter than when it was opened: restore it";

#[test]
fn a_raw_backing_file() {
    let dir = Dir::new();
    // Not all of the last sector, cluster and disk: there zeros are right.
    let base = dir.raw("base", &[1; 9000]);
    let top = dir.qcow2("top.qcow2", 16384, Some(("base", "raw")));
    let image = opened(&top);
    assert_eq!(bytes(&*image, 4096, 12288), [vec![1; 9000 - 4096], vec![0; 16384 - 9000]].concat());
    cut(&base, 8704);
    assert_eq!(bytes(&*image, 0, 8704), [1; 8704]);
    let text = told(image.read_at(&mut [0; 512], 8704));
    assert_eq!(text, format!("can't use disk image {}: its backing file {}: {WHY}", top.display(), base.display()));
    // A write to a part of a cluster takes the rest from there.
    assert!(told(image.write_at(&[2; 512], 8192)).ends_with(WHY));
    dir.raw("base", &[1; 9000]);
    assert_eq!(bytes(&*image, 8704, 512), [[1; 296].as_slice(), &[0; 216]].concat());
}

#[test]
fn a_qcow2_backing_file() {
    let dir = Dir::new();
    let base = dir.qcow2("base.qcow2", 1 << 20, None);
    opened(&base).write_at(&[1; 1 << 20], 0).unwrap();
    let image = opened(&dir.qcow2("top.qcow2", 1 << 20, Some(("base.qcow2", "qcow2"))));
    assert_eq!(bytes(&*image, 0, 4096), [1; 4096]);
    cut(&base, std::fs::metadata(&base).unwrap().len() - 4096);
    let text = told(image.read_at(&mut vec![0; 1 << 20], 0));
    assert!(text.ends_with(&format!("its backing file {}: {WHY}", base.display())), "{text}");
}

#[test]
fn a_qcow2_image_that_is_written() {
    let dir = Dir::new();
    let path = dir.qcow2("disk.qcow2", 1 << 20, None);
    let image = opened(&path);
    // The file grows with every cluster, and none of that is missed.
    for cluster in 0..128 {
        image.write_at(&[1; 4096], cluster * 4096).unwrap();
    }
    image.flush().unwrap();
    assert_eq!(bytes(&*image, 0, 1 << 20), [vec![1; 1 << 19], vec![0; 1 << 19]].concat());
    let len = std::fs::metadata(&path).unwrap().len();
    cut(&path, len - 4096);
    let text = told(image.read_at(&mut vec![0; 1 << 19], 0));
    assert_eq!(text, format!("can't use disk image {}: {WHY}", path.display()));
    // A new cluster would make the file long again, with zeros in it.
    assert!(told(image.write_at(&[1; 4096], 1 << 19)).ends_with(WHY));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), len - 4096);
}
