//! Wide accesses to byte-wide registers: a port bus hands them out byte by byte, lowest address first.

use crate::bus::Access;

/// Reads `access.len` bytes from `offset` by `register`; all ones from `end` on.
pub(super) fn read(access: &Access, offset: u64, end: u64, mut register: impl FnMut(u64) -> u8) -> u64 {
    let mut value = [0xff; 8];
    for (byte, at) in value.iter_mut().zip(offset..end).take(access.len.into()) {
        *byte = register(at);
    }
    u64::from_le_bytes(value)
}

/// Writes the low `access.len` bytes of `data` at `offset` by `register`; what lies at `end` or above vanishes.
pub(super) fn write(access: &Access, offset: u64, end: u64, data: u64, mut register: impl FnMut(u64, u8)) {
    for (byte, at) in data.to_le_bytes().into_iter().zip(offset..end).take(access.len.into()) {
        register(at, byte);
    }
}

/// Byte `index` of a little-endian `value`.
pub(super) fn get(value: u64, index: u64) -> u8 {
    (value >> (8 * index)) as u8
}

/// `value` with byte `index` replaced.
pub(super) fn put(value: u64, index: u64, byte: u8) -> u64 {
    (value & !(0xff << (8 * index))) | u64::from(byte) << (8 * index)
}
