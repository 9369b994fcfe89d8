//! The value of `--balloon`.

use std::str::FromStr;

use super::disk::split;
use super::values::{ValueError, wrong};

/// `--balloon on[,deflate-on-oom=on|off][,free-page-reporting=on|off]`: QEMU's words, both off if left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonSpec {
    /// Whether the guest may take pages back before it kills programs for want of memory.
    pub deflate_on_oom: bool,
    /// Whether the guest is to report free pages.
    pub reporting: bool,
    /// Whether it is there, for the guest's statistics, where no memory can go back: QEMU's command line has one for libvirt always.
    pub even_pinned: bool,
}

impl FromStr for BalloonSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let options = split(s);
        let Some(("on", rest)) = options.split_first().map(|(word, rest)| (&word[..], rest)) else {
            return wrong("write on[,deflate-on-oom=on|off][,free-page-reporting=on|off]");
        };
        let (mut deflate, mut reporting) = (None, None);
        for option in rest {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let place = match name {
                "deflate-on-oom" if deflate.is_none() => &mut deflate,
                "free-page-reporting" if reporting.is_none() => &mut reporting,
                _ => {
                    return wrong(format!(
                        "'{option}': write on[,deflate-on-oom=on|off][,free-page-reporting=on|off], each once"
                    ));
                }
            };
            *place = match value {
                "on" => Some(true),
                "off" => Some(false),
                other => return wrong(format!("{name}={other}: write on or off")),
            };
        }
        Ok(Self { deflate_on_oom: deflate.unwrap_or(false), reporting: reporting.unwrap_or(false), even_pinned: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_in_every_notation() {
        assert_eq!("on".parse(), Ok(BalloonSpec::default()));
        let all = BalloonSpec { deflate_on_oom: true, reporting: true, even_pinned: false };
        assert_eq!("on,free-page-reporting=on,deflate-on-oom=on".parse(), Ok(all));
        for bad in
            ["", "off", "deflate-on-oom=on", "on,on", "on,deflate-on-oom", "on,deflate-on-oom=on,deflate-on-oom=on"]
        {
            assert!(bad.parse::<BalloonSpec>().is_err(), "{bad:?}");
        }
    }
}
