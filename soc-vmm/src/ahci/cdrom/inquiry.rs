//! Who the drive is (SPC-4 §6.6, §7.8).

use super::Sense;

/// INQUIRY: standard data, or a page of vital product data.
pub(super) fn inquiry(flags: u8, page: u8, serial: &str) -> Result<Vec<u8>, Sense> {
    let vital = |page: u8, body: &[u8]| {
        let [high, low] = (body.len() as u16).to_be_bytes();
        [&[5, page, high, low], body].concat()
    };
    match (flags & 1 != 0, page) {
        // Type 5, removable, SPC-3, format 2, 31 bytes more; then who made it, what it is, which revision.
        (false, 0) => Ok([&[5, 0x80, 5, 2, 31, 0, 0, 0], &b"OUTBOARD"[..], b"CD-ROM          ", b"1.0 "].concat()),
        (true, 0) => Ok(vital(0, &[0, 0x80])),
        (true, 0x80) => Ok(vital(0x80, serial.as_bytes())),
        _ => Err(Sense::BAD_FIELD),
    }
}
