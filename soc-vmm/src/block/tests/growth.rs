//! Images that become larger.

use super::*;

#[test]
fn what_an_image_gains_are_zeros() {
    let dir = Dir::new();
    // More of the backing file than the image once showed.
    dir.raw("base.img", &[7; 64 << 10]);
    for direct in [false, true] {
        let images = [
            dir.raw("disk.img", &[7; 32 << 10]),
            dir.qcow2("disk.qcow2", 32 << 10, None),
            dir.qcow2("top.qcow2", 32 << 10, Some(("base.img", "raw"))),
        ];
        for path in images {
            let image = open_anew(&ImageSpec { direct, ..ImageSpec::new(&path) });
            image.write_at(&[7; 32 << 10], 0).unwrap();
            image.grow(4 << 20).unwrap();
            assert_eq!(image.size(), 4 << 20);
            image.write_at(&[9; 512], (4 << 20) - 512).unwrap();
            let whole = [vec![7; 32 << 10], vec![0; (4 << 20) - (32 << 10) - 512], vec![9; 512]].concat();
            assert!(bytes(&*image, 0, 4 << 20) == whole, "{}", path.display());
            image.flush().unwrap();
            drop(image);
            assert!(bytes(&*opened(&path), 0, 4 << 20) == whole, "{}", path.display());
        }
    }
}

#[test]
fn no_image_shrinks_or_grows_past_what_a_file_can_have() {
    let dir = Dir::new();
    for path in [dir.raw("disk.img", &[7; 32 << 10]), dir.qcow2("disk.qcow2", 32 << 10, None)] {
        let image = opened(&path);
        let refused = |size| image.grow(size).unwrap_err();
        assert!(matches!(refused(512), BlockError::Shrinks { .. }));
        assert!(matches!(refused((32 << 10) + 1), BlockError::OddSize { .. }));
        assert!(matches!(refused(1 << 63), BlockError::OddSize { .. }));
        let text = with_causes(&refused((1 << 63) - 512));
        assert!(text.contains(&path.display().to_string()) && text == one_line(&text), "{text}");
        assert_eq!(image.size(), 32 << 10);
        image.write_at(&[1; 512], 0).unwrap();
        image.grow(64 << 10).unwrap();
        drop(image);
        let read_only = open(&ImageSpec::read_only(&path)).unwrap();
        assert!(matches!(read_only.grow(1 << 20), Err(BlockError::ReadOnly)));
    }
}
