//! qcow2 files.

use proptest::prelude::*;

use super::raw::{SECTORS, calls, perform};
use super::*;

#[test]
fn what_was_not_written_is_the_backing_files() {
    let dir = Dir::new();
    let base = dir.raw("base.img", &[7; 8192]);
    dir.qcow2("middle.qcow2", 16384, Some(("base.img", "raw")));
    opened(&dir.path("middle.qcow2")).write_at(&[8; 512], 4096).unwrap();
    let top = dir.qcow2("top.qcow2", 32768, Some(("middle.qcow2", "qcow2")));
    let files = [&top, &dir.path("middle.qcow2"), &base].map(|path| FileId::of(&std::fs::metadata(path).unwrap()));
    let look = |image: &dyn BlockBackend, first: u8| {
        assert_eq!(bytes(image, 0, 512), [first; 512]);
        assert_eq!(bytes(image, 3584, 512), [7; 512]);
        assert_eq!(bytes(image, 4096, 1024), [[8; 512], [7; 512]].concat());
        let rest = (image.size() - 8192) as usize;
        assert_eq!(bytes(image, 8192, rest), vec![0; rest]);
    };
    {
        let image = opened(&top);
        assert_eq!((image.size(), image.is_read_only()), (32768, false));
        assert_eq!(image.files(), files);
        look(&*image, 7);
        image.write_at(&[9; 512], 0).unwrap();
        image.flush().unwrap();
        look(&*image, 9);
        image.write_zeroes(0, 512, true).unwrap();
        look(&*image, 0);
        image.write_zeroes(4096, 4096, true).unwrap();
        assert_eq!(bytes(&*image, 4096, 4096), [0; 4096]);
    }
    look(&*open(&ImageSpec::read_only(dir.path("middle.qcow2"))).unwrap(), 7);
    assert_eq!(std::fs::read(base).unwrap(), [7; 8192]);
}

/// A big-endian word of a file.
fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn an_image_that_calls_its_own_header_free_keeps_it() {
    let dir = Dir::new();
    let path = dir.qcow2("disk.qcow2", 1 << 20, None);
    let good = std::fs::read(&path).unwrap();
    let table = word(&good, 48);
    let block = word(&good, table);

    let mut bytes = good.clone();
    bytes[block as usize..][..2].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let image = opened(&path);
    let texts: Vec<_> =
        (0..4).filter_map(|n| image.write_at(&[1; 4096], n << 16).err()).map(|e| with_causes(&e)).collect();
    assert!(
        !texts.is_empty() && texts.iter().all(|text| text.contains("call the cluster of its header free")),
        "{texts:?}"
    );
    drop(image);
    assert_eq!(std::fs::read(&path).unwrap()[..4096], bytes[..4096]);

    bytes[table as usize..][..8].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    assert!(refusal(&ImageSpec::new(&path)).contains("(refcount_table[0] is 0x0): repair it"));
    open(&ImageSpec::read_only(&path)).unwrap();
}

#[test]
fn features_that_hold_while_nobody_writes_are_cleared_by_who_may_write() {
    let dir = Dir::new();
    let path = dir.qcow2("disk.qcow2", 1 << 20, None);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[88..96].copy_from_slice(&1u64.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let features = || word(&std::fs::read(&path).unwrap(), 88);
    open(&ImageSpec::read_only(&path)).unwrap();
    assert_eq!(features(), 1);
    opened(&path);
    assert_eq!(features(), 0);
}

#[test]
fn a_read_only_image_is_not_written() {
    let dir = Dir::new();
    let path = dir.qcow2("disk.qcow2", 8192, None);
    let before = std::fs::read(&path).unwrap();
    let image = open(&ImageSpec::read_only(&path)).unwrap();
    assert!(matches!(image.write_at(&[1; 512], 0), Err(BlockError::ReadOnly)));
    assert!(matches!(image.discard(0, 512), Err(BlockError::ReadOnly)));
    assert!(matches!(image.write_zeroes(0, 512, false), Err(BlockError::ReadOnly)));
    assert!(matches!(image.read_at(&mut [0; 512], 8192), Err(BlockError::OutOfRange { .. })));
    image.flush().unwrap();
    drop(image);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn version_2_has_no_zeros_of_its_own() {
    let dir = Dir::new();
    let path = dir.qcow2("disk.qcow2", 1 << 20, None);
    // What version 3 has more is not looked at.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[2], 7).unwrap();
    let image = opened(&path);
    for may_unmap in [false, true] {
        image.write_at(&[1; 200 << 10], 512).unwrap();
        image.write_zeroes(1024, 199 << 10, may_unmap).unwrap();
        assert_eq!(bytes(&*image, 512, 1024), [[1; 512], [0; 512]].concat());
        assert_eq!(bytes(&*image, 199 << 10, 2048), [[0; 1024].as_slice(), &[1; 512], &[0; 512]].concat());
    }
    image.discard(0, 1 << 20).unwrap();
}

#[test]
fn threads_share_an_image() {
    let dir = Dir::new();
    let path = dir.qcow2("disk.qcow2", 1 << 20, None);
    let image = opened(&path);
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let image = &image;
            scope.spawn(move || {
                for n in 0..64u64 {
                    let at = (n * 4 + u64::from(thread)) * 4096;
                    image.write_at(&[thread + 1; 4096], at).unwrap();
                    if n % 8 == 0 {
                        image.discard(at, 4096).unwrap();
                        image.write_at(&[thread + 1; 4096], at).unwrap();
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    drop(image);
    let image = opened(&path);
    for cluster in 0..256u64 {
        assert_eq!(bytes(&*image, cluster * 4096, 4096), [cluster as u8 % 4 + 1; 4096]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_disk_holds_what_was_written(calls in calls()) {
        let dir = Dir::new();
        dir.raw("base.img", &[0x5a; (SECTORS * 512) as usize]);
        let path = dir.qcow2("disk.qcow2", SECTORS * 512, Some(("base.img", "raw")));
        let mut model = vec![0x5a; (SECTORS * 512) as usize];
        let image = opened(&path);
        perform(&*image, &calls, &mut model);
        prop_assert_eq!(bytes(&*image, 0, model.len()), &model[..]);
        image.flush().unwrap();
        drop(image);
        prop_assert_eq!(bytes(&*opened(&path), 0, model.len()), model);
    }

    /// Damage anywhere in the metadata: an error or some bytes, and an end.
    #[test]
    fn a_damaged_image_ends_nobody(
        calls in calls(),
        damage in proptest::collection::vec((0usize..6 * 4096, any::<u8>()), 1..8),
    ) {
        let dir = Dir::new();
        let path = dir.qcow2("disk.qcow2", SECTORS * 512, None);
        let mut model = vec![0; (SECTORS * 512) as usize];
        {
            let image = opened(&path);
            perform(&*image, &calls, &mut model);
            image.flush().unwrap();
        }
        let mut file = std::fs::read(&path).unwrap();
        let len = file.len();
        for (at, byte) in damage {
            file[at % len] = byte;
        }
        std::fs::write(&path, file).unwrap();
        if let Ok(image) = open(&ImageSpec::new(&path)) {
            let len = image.size().min(model.len() as u64);
            let _ = image.read_at(&mut model[..len as usize], 0);
            for call in [image.write_at(&model[..512], 0), image.write_zeroes(0, len, true), image.discard(0, len)] {
                let _ = call;
            }
            let _ = image.flush();
        }
    }
}
