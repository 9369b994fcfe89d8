//! What a chip tells of itself (JEDEC JESD68.01, Common Flash Interface; the Intel command set is 0x0001).

use super::SECTOR;

/// Where the query structure begins.
const START: u64 = 0x10;
/// A buffered write takes 2 to this many bytes.
const BUFFER_SHIFT: u8 = 8;
/// The most bytes of a buffered write.
pub(super) const BUFFER: usize = 1 << BUFFER_SHIFT;
/// Where the Intel extension begins.
const EXTENSION: u16 = 0x31;

/// The byte at `offset` of a chip with `len` bytes; zero where there is nothing to tell.
pub(super) fn byte(len: usize, offset: u64) -> u8 {
    let at = offset & 0xff;
    let Some(at) = at.checked_sub(START) else { return 0 };
    structure(len).get(at as usize).copied().unwrap_or(0)
}

fn structure(len: usize) -> [u8; 0x30] {
    let size_shift = len.next_power_of_two().trailing_zeros() as u8;
    let last_sector = ((len as u64 / SECTOR).saturating_sub(1) as u16).to_le_bytes();
    let sector = ((SECTOR >> 8) as u16).to_le_bytes();
    let extension = EXTENSION.to_le_bytes();
    let mut bytes = [0; 0x30];
    let mut put = |at: u64, values: &[u8]| bytes[(at - START) as usize..][..values.len()].copy_from_slice(values);
    // Command set 1 and where its extension is; no other set.
    put(0x10, b"QRY");
    put(0x13, &[1, 0, extension[0], extension[1]]);
    // 4.5 to 5.5 V, no programming voltage; typical and longest times of programming and erasing, 2 to the power.
    put(0x1b, &[0x45, 0x55, 0, 0]);
    put(0x1f, &[7, 7, 10, 0, 4, 4, 4, 0]);
    // Size, both bus widths, buffer, one region of equal sectors.
    put(0x27, &[size_shift, 2, 0, BUFFER_SHIFT, 0, 1]);
    put(0x2d, &[last_sector[0], last_sector[1], sector[0], sector[1]]);
    // The extension, version 1.0; one protection field.
    put(EXTENSION.into(), b"PRI10");
    put(0x3f, &[1]);
    bytes
}
