//! Raw files.

use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;

#[test]
fn an_odd_size_is_rounded_up_and_the_rest_is_zeros() {
    let dir = Dir::new();
    let path = dir.raw("odd", &[1; 700]);
    let image = opened(&path);
    assert_eq!(image.size(), 1024);
    assert_eq!(bytes(&*image, 512, 512), [[1; 188].as_slice(), &[0; 324]].concat());
    image.write_at(&[2; 512], 512).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
    assert_eq!(bytes(&*image, 512, 512), [2; 512]);
}

#[test]
fn nothing_behind_the_end_is_touched() {
    let dir = Dir::new();
    let path = dir.raw("disk", &[1; 4096]);
    let image = opened(&path);
    for offset in [3585, 4096, u64::MAX - 511, u64::MAX] {
        assert!(matches!(image.read_at(&mut [0; 512], offset), Err(BlockError::OutOfRange { size: 4096, .. })));
        assert!(matches!(image.write_at(&[0; 512], offset), Err(BlockError::OutOfRange { .. })));
        assert!(matches!(image.discard(offset, 512), Err(BlockError::OutOfRange { .. })));
        assert!(matches!(image.write_zeroes(offset, 512, true), Err(BlockError::OutOfRange { .. })));
    }
    assert_eq!(std::fs::read(&path).unwrap(), [1; 4096]);
}

#[test]
fn a_file_that_shrinks_is_an_error_and_not_zeros() {
    let dir = Dir::new();
    let path = dir.raw("disk", &[1; 8192]);
    let image = opened(&path);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(4096 + 100).unwrap();
    assert_eq!(bytes(&*image, 0, 4096), [1; 4096]);
    let error = image.read_at(&mut [0; 512], 4096).unwrap_err();
    assert!(matches!(error, BlockError::Image { source: ImageProblem::Shrunk, .. }), "{error}");
}

#[test]
fn what_is_discarded_takes_no_room() {
    let dir = Dir::new();
    let path = dir.raw("disk", &[1; 1 << 20]);
    let image = opened(&path);
    image.flush().unwrap();
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    let before = blocks();
    image.discard(0, 1 << 19).unwrap();
    let half = blocks();
    assert!(half < before, "{half} of {before} blocks");
    image.write_zeroes(1 << 19, 1 << 19, true).unwrap();
    assert!(blocks() < half);
    assert_eq!(bytes(&*image, 1 << 19, 1 << 19), vec![0; 1 << 19]);
    assert_eq!(image.size(), 1 << 20);
}

#[test]
fn a_read_only_image_is_not_written() {
    let dir = Dir::new();
    let path = dir.raw("disk", &[1; 4096]);
    let image = open(&ImageSpec::read_only(&path)).unwrap();
    assert!(image.is_read_only());
    assert!(matches!(image.write_at(&[0; 512], 0), Err(BlockError::ReadOnly)));
    assert!(matches!(image.discard(0, 512), Err(BlockError::ReadOnly)));
    assert!(matches!(image.write_zeroes(0, 512, false), Err(BlockError::ReadOnly)));
    image.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [1; 4096]);
}

/// One call of a device.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Write { sector: u64, count: u64, byte: u8 },
    Zero { sector: u64, count: u64, may_unmap: bool },
    Discard { sector: u64, count: u64 },
    Flush,
}

pub(super) const SECTORS: u64 = 96;

pub(super) fn calls() -> impl Strategy<Value = Vec<Call>> {
    let range = || (0..SECTORS).prop_flat_map(|sector| (Just(sector), 0..=SECTORS - sector));
    let call = prop_oneof![
        (range(), 1u8..).prop_map(|((sector, count), byte)| Call::Write { sector, count, byte }),
        (range(), any::<bool>()).prop_map(|((sector, count), may_unmap)| Call::Zero { sector, count, may_unmap }),
        range().prop_map(|(sector, count)| Call::Discard { sector, count }),
        Just(Call::Flush),
    ];
    proptest::collection::vec(call, 0..24)
}

/// Makes the calls; `model` then holds what must be there. What was discarded is written again, since it may hold anything.
pub(super) fn perform(image: &dyn BlockBackend, calls: &[Call], model: &mut [u8]) {
    let range = |sector: u64, count: u64| (sector * 512) as usize..((sector + count) * 512) as usize;
    for call in calls {
        match *call {
            Call::Write { sector, count, byte } => {
                let part = &mut model[range(sector, count)];
                part.fill(byte);
                image.write_at(part, sector * 512).unwrap();
            }
            Call::Zero { sector, count, may_unmap } => {
                model[range(sector, count)].fill(0);
                image.write_zeroes(sector * 512, count * 512, may_unmap).unwrap();
            }
            Call::Discard { sector, count } => {
                image.discard(sector * 512, count * 512).unwrap();
                image.write_at(&model[range(sector, count)], sector * 512).unwrap();
            }
            Call::Flush => image.flush().unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_disk_holds_what_was_written(calls in calls()) {
        let dir = Dir::new();
        let mut model = vec![0x5a; (SECTORS * 512) as usize];
        let path = dir.raw("disk", &model);
        let image = opened(&path);
        perform(&*image, &calls, &mut model);
        prop_assert_eq!(bytes(&*image, 0, model.len()), &model[..]);
        prop_assert_eq!(std::fs::read(&path).unwrap(), model);
    }
}
