//! What a disc says of itself: one session with one data track (MMC-6 §6.22, §6.25, §6.26).

use super::Sense;

/// Lead-out's number.
const LEAD_OUT: u8 = 0xaa;
/// ADR 1, control 4: a data track that can't be copied.
const DATA_TRACK: u8 = 0x14;
/// A disc's first sector is 2 seconds from its beginning.
const PRE_GAP: u32 = 150;
/// Where a DVD's data begins, in its own count.
const DVD_FIRST: u32 = 0x3_0000;

/// How addresses are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// By sector.
    Lba,
    /// By minute, second and frame.
    Msf,
}

impl Format {
    fn address(self, sector: u32) -> [u8; 4] {
        match self {
            Self::Lba => sector.to_be_bytes(),
            Self::Msf => {
                let [minute, second, frame] = msf(sector);
                [0, minute, second, frame]
            }
        }
    }
}

/// Minute, second and frame; a large disc has more minutes than fit.
fn msf(sector: u32) -> [u8; 3] {
    let frames = u64::from(sector) + u64::from(PRE_GAP);
    let minute = u8::try_from(frames / (75 * 60)).unwrap_or(u8::MAX);
    [minute, (frames / 75 % 60) as u8, (frames % 75) as u8]
}

/// READ TOC/PMA/ATIP of a disc of so many sectors.
pub(super) fn contents(kind: u8, format: Format, from_track: u8, sectors: u32) -> Result<Vec<u8>, Sense> {
    let track = |number, sector| [&[0, DATA_TRACK, number, 0], &format.address(sector)[..]].concat();
    let body = match kind {
        // The tracks.
        0 if from_track > 1 && from_track != LEAD_OUT => return Err(Sense::BAD_FIELD),
        0 if from_track == LEAD_OUT => track(LEAD_OUT, sectors),
        0 => [track(1, 0), track(LEAD_OUT, sectors)].concat(),
        // The last session.
        1 => track(1, 0),
        // As it is on the disc: first and last track, lead-out, the track.
        2 if from_track > 1 => return Err(Sense::BAD_FIELD),
        2 => {
            let points = [(0xa0, [1, 0, 0]), (0xa1, [1, 0, 0]), (0xa2, msf(sectors)), (1, msf(0))];
            let entry = |(point, at): (u8, [u8; 3])| [&[1, DATA_TRACK, 0, point, 0, 0, 0, 0], &at[..]].concat();
            points.into_iter().flat_map(entry).collect()
        }
        _ => return Err(Sense::BAD_FIELD),
    };
    let len = (body.len() as u16 + 2).to_be_bytes();
    Ok([&len[..], &[1, 1], &body].concat())
}

/// READ DISC INFORMATION: complete, one session, one track, free to be used.
pub(super) fn information() -> Vec<u8> {
    let mut info = vec![0; 34];
    (info[1], info[2]) = (32, 0b1110);
    (info[3], info[4], info[5], info[6], info[7]) = (1, 1, 1, 1, 1 << 5);
    info
}

/// READ DISC STRUCTURE of a DVD.
pub(super) fn structure(media: u8, layer: u8, kind: u8, sectors: u32) -> Result<Vec<u8>, Sense> {
    if media != 0 || layer != 0 || !super::configuration::is_dvd(sectors) {
        return Err(Sense::BAD_FIELD);
    }
    let body = match kind {
        // Physical: DVD-ROM, 120 mm, one layer, embossed; first and last sector.
        0 => {
            let mut body = vec![0; 2048];
            body[..3].copy_from_slice(&[0x01, 0x0f, 0x01]);
            body[5..8].copy_from_slice(&DVD_FIRST.to_be_bytes()[1..]);
            body[9..12].copy_from_slice(&DVD_FIRST.saturating_add(sectors - 1).min(0xff_ffff).to_be_bytes()[1..]);
            body
        }
        // Copyright: none.
        1 => vec![0; 4],
        _ => return Err(Sense::BAD_FIELD),
    };
    let len = (body.len() as u16 + 2).to_be_bytes();
    Ok([&len[..], &[0, 0], &body].concat())
}
