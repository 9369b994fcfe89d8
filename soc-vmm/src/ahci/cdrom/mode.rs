//! MODE SENSE's pages (MMC-6 §7).

use super::Sense;

const ERROR_RECOVERY: u8 = 0x01;
const CAPABILITIES: u8 = 0x2a;
const ALL: u8 = 0x3f;

/// MODE SENSE(10): a page or all of them, behind their header. None of them can be changed.
pub(super) fn sense(page: u8, changeable: bool, locked: bool) -> Result<Vec<u8>, Sense> {
    let pages = [error_recovery(), capabilities(locked)];
    let wanted = pages.into_iter().filter(|bytes| page == ALL || page == bytes[0]);
    let mut body: Vec<u8> = vec![0; 6];
    for mut bytes in wanted {
        if changeable {
            bytes[2..].fill(0);
        }
        body.extend(bytes);
    }
    if body.len() == 6 {
        return Err(Sense::BAD_FIELD);
    }
    Ok([&(body.len() as u16).to_be_bytes(), &body[..]].concat())
}

fn error_recovery() -> Vec<u8> {
    // No retries to speak of.
    vec![ERROR_RECOVERY, 6, 0, 5, 0, 0, 0, 0]
}

fn capabilities(locked: bool) -> Vec<u8> {
    let mut page = vec![0; 22];
    (page[0], page[1]) = (CAPABILITIES, 20);
    // Reads CD-R, CD-RW, addresses of method 2, DVD-ROM.
    page[2] = 0b1111;
    // Mode 2 forms 1 and 2, more than one session.
    page[4] = 0b111 << 4;
    // A tray that can be locked, and ejects.
    page[6] = 1 << 5 | 1 << 3 | u8::from(locked) << 1 | 1;
    // 4 × 176 kB/s at most and now; two levels of volume; a buffer of 512 KiB.
    for (at, value) in [(8, 704u16), (10, 2), (12, 512), (14, 704)] {
        page[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }
    page
}
