//! GET CONFIGURATION: profiles and features (MMC-6 §5, §6.5).

use super::{SECTOR, Sense};

const PROFILE_CD: u16 = 0x08;
const PROFILE_DVD: u16 = 0x10;
/// Sectors of a CD of 80 minutes: what is larger is a DVD.
const CD_SECTORS: u32 = 80 * 60 * 75;

// Features.
const PROFILE_LIST: u16 = 0x00;
const CORE: u16 = 0x01;
const REMOVABLE: u16 = 0x03;
const RANDOM_READABLE: u16 = 0x10;
const MULTI_READ: u16 = 0x1d;
const CD_READ: u16 = 0x1e;
const DVD_READ: u16 = 0x1f;

/// A disc of so many sectors is a DVD.
pub(super) fn is_dvd(sectors: u32) -> bool {
    sectors > CD_SECTORS
}

struct Feature {
    code: u16,
    version: u8,
    current: bool,
    persistent: bool,
    body: Vec<u8>,
}

/// The features from number `from` on: all (`which` 0), those current (1), or that one (2). `sectors` are those of the medium.
pub(super) fn configuration(which: u8, from: u16, sectors: Option<u32>) -> Result<Vec<u8>, Sense> {
    if which == 3 {
        return Err(Sense::BAD_FIELD);
    }
    let dvd = sectors.map(is_dvd);
    let profile = dvd.map_or(0, |dvd| if dvd { PROFILE_DVD } else { PROFILE_CD });
    let mut body = vec![0, 0];
    body.extend(profile.to_be_bytes());
    for feature in features(dvd) {
        let wanted = match which {
            0 => feature.code >= from,
            1 => feature.code >= from && feature.current,
            _ => feature.code == from,
        };
        if wanted {
            body.extend(feature.code.to_be_bytes());
            let flags = feature.version << 2 | u8::from(feature.persistent) << 1 | u8::from(feature.current);
            body.extend([flags, feature.body.len() as u8]);
            body.extend(feature.body);
        }
    }
    Ok([&(body.len() as u32).to_be_bytes(), &body[..]].concat())
}

/// All of them; `dvd`: whether the medium is one, if there is a medium.
fn features(dvd: Option<bool>) -> Vec<Feature> {
    let always = |code, version, body| Feature { code, version, current: true, persistent: true, body };
    let with_medium = |code, version, current, body| Feature { code, version, current, persistent: false, body };
    let profile = |profile: u16, of_dvd| {
        let [high, low] = profile.to_be_bytes();
        [high, low, u8::from(dvd == Some(of_dvd)), 0]
    };
    let [.., high, low] = (SECTOR as u32).to_be_bytes();
    vec![
        always(PROFILE_LIST, 0, [profile(PROFILE_DVD, true), profile(PROFILE_CD, false)].concat()),
        // ATAPI; device busy events.
        always(CORE, 2, vec![0, 0, 0, 2, 1, 0, 0, 0]),
        // A tray that loads, ejects and can be locked.
        always(REMOVABLE, 1, vec![1 << 5 | 1 << 4 | 1 << 3 | 1, 0, 0, 0]),
        // Sectors of 2048 bytes, one at a time.
        with_medium(RANDOM_READABLE, 0, dvd.is_some(), vec![0, 0, high, low, 0, 1, 0, 0]),
        with_medium(MULTI_READ, 0, dvd == Some(false), vec![]),
        with_medium(CD_READ, 2, dvd == Some(false), vec![0; 4]),
        with_medium(DVD_READ, 0, dvd == Some(true), vec![]),
    ]
}
