//! The value of `--entropy`.

use std::str::FromStr;
use std::time::Duration;

use super::disk::split;
use super::values::{ValueError, limit, wrong};
use crate::virtio::entropy::RateLimit;

/// `--entropy on|max-bytes=N[,period=MS]`, QEMU's words: bytes, and milliseconds (65536 if left out).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntropySpec {
    /// How much the guest may have; none: what it asks for.
    pub limit: Option<RateLimit>,
}

/// QEMU's period, in ms.
const PERIOD: u64 = 1 << 16;

impl FromStr for EntropySpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        if s == "on" {
            return Ok(Self { limit: None });
        }
        let (mut bytes, mut period) = (None, None);
        for option in split(s) {
            let (name, value) = option.split_once('=').unwrap_or((&option, ""));
            let place = match name {
                "max-bytes" if bytes.is_none() => &mut bytes,
                "period" if period.is_none() => &mut period,
                _ => return wrong(format!("'{option}': write on, or max-bytes=N[,period=MS], each once")),
            };
            *place = Some(limit(name, value)?);
        }
        let Some(bytes) = bytes else { return wrong("a limit needs max-bytes=N") };
        Ok(Self { limit: Some(RateLimit { bytes, period: Duration::from_millis(period.unwrap_or(PERIOD)) }) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_in_every_notation() {
        let limit =
            |bytes, ms| Some(EntropySpec { limit: Some(RateLimit { bytes, period: Duration::from_millis(ms) }) });
        assert_eq!("on".parse(), Ok(EntropySpec { limit: None }));
        assert_eq!("max-bytes=1024,period=1000".parse().ok(), limit(1024, 1000));
        assert_eq!("max-bytes=1".parse().ok(), limit(1, 65536));
        for bad in
            ["", "off", "max-bytes=0", "period=5", "max-bytes=1,max-bytes=1", "max-bytes=-1", "max-bytes=1,period=0"]
        {
            assert!(bad.parse::<EntropySpec>().is_err(), "{bad:?}");
        }
    }
}
