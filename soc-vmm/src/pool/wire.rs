//! What a client and the pool say to each other (docs/pool.md): a record is one line of JSON.
//!
//! Each side takes the other for hostile: lines have a longest length, members that aren't known are refused, and what a peer says of itself is
//! only shown.

use serde::{Deserialize, Serialize};

/// The version of all of it.
pub(super) const VERSION: u32 = 1;
/// Longest line of a client, with its end.
pub(super) const MOST_REQUEST: usize = 4096;
/// Longest line of the pool.
pub(super) const MOST_REPLY: usize = 256 << 10;
/// Most characters of what a client says of itself.
const MOST_WORDS: usize = 256;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// A function, for as long as the connection lasts.
    Function { version: u32, vm: String },
    /// All functions.
    List { version: u32 },
    /// What processors the server can give.
    Host { version: u32 },
}

/// What the pool answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Reply {
    /// The function; its descriptors come with the first byte.
    Function { version: u32, function: String },
    /// All functions.
    List { version: u32, functions: Vec<Listed> },
    /// The CPUID that the server's KVM supports: leaf, sub-leaf, flags, EAX to EDX of each entry.
    Host { version: u32, cpuid: Vec<[u32; 7]> },
    /// Nothing; why, in one line.
    Refused { version: u32, why: String },
}

/// What a client says before it gives a function back that it couldn't use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Complaint {
    /// In one line.
    pub(super) unusable: String,
}

/// A function, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Listed {
    /// As the configuration writes it.
    pub(super) function: String,
    pub(super) state: Standing,
    /// The VM that uses it, by its own word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) vm: Option<String>,
    /// Of the process that uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pid: Option<i32>,
    /// Of the user that uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uid: Option<u32>,
    /// Since when it is so: seconds since 1970.
    pub(super) since: u64,
    /// Why it is broken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) why: Option<String>,
}

/// How a function stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Standing {
    /// It is to be had.
    Free,
    /// A client has it.
    Used,
    /// Its last user is gone, or the pool has just started: it is made sure that nobody is at work on it.
    Clearing,
    /// It can't be used, or another program has it.
    Broken,
}

impl Request {
    /// Understands a client's first line.
    ///
    /// # Errors
    /// It is none of this version; in one line.
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        check_version(line)?;
        let request = serde_json::from_slice(line).map_err(|e| format!("the request is none: {e}"))?;
        match &request {
            Self::Function { vm, .. } if !is_word(vm) => Err(format!("a VM's name has 1 to {MOST_WORDS} characters")),
            _ => Ok(request),
        }
    }
}

impl Reply {
    /// Understands the pool's line.
    ///
    /// # Errors
    /// It is none of this version; in one line.
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        check_version(line)?;
        serde_json::from_slice(line).map_err(|e| format!("the pool's answer is none: {e}"))
    }

    /// A refusal.
    pub(super) fn refused(why: impl Into<String>) -> Self {
        Self::Refused { version: VERSION, why: why.into() }
    }
}

impl Complaint {
    /// Understands what a client says while it has a function.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let complaint: Self = serde_json::from_slice(line).ok()?;
        is_word(&complaint.unusable).then_some(complaint)
    }

    /// A complaint, as long as it may be.
    pub(super) fn new(why: &str) -> Self {
        let unusable: String = why.chars().filter(|c| !c.is_control()).take(MOST_WORDS).collect();
        Self { unusable: if unusable.is_empty() { "for no reason".into() } else { unusable } }
    }
}

/// A record as a line.
pub(super) fn line(record: &impl Serialize) -> Vec<u8> {
    // Strings and numbers, which JSON can write.
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.push(b'\n');
    line
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().count() <= MOST_WORDS && !text.chars().any(char::is_control)
}

/// Before anything else of a record is looked at: another version's may look quite different.
fn check_version(line: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    match serde_json::from_slice(line) {
        Ok(Versioned { version: VERSION }) => Ok(()),
        Ok(Versioned { version }) => Err(format!(
            "version {version} of the pool's protocol is spoken there, and {VERSION} here; run the same soc-vmm on both sides"
        )),
        Err(e) => Err(format!("no record of the pool's protocol: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn records_are_written_as_documented() {
        let text = |line: Vec<u8>| String::from_utf8(line).unwrap();
        let ask = Request::Function { version: 1, vm: "a".into() };
        assert_eq!(text(line(&ask)), "{\"ask\":\"function\",\"version\":1,\"vm\":\"a\"}\n");
        assert_eq!(text(line(&Request::List { version: 1 })), "{\"ask\":\"list\",\"version\":1}\n");
        let answer = Reply::Function { version: 1, function: "unix:/a".into() };
        assert_eq!(text(line(&answer)), "{\"answer\":\"function\",\"version\":1,\"function\":\"unix:/a\"}\n");
        assert_eq!(text(line(&Reply::refused("no"))), "{\"answer\":\"refused\",\"version\":1,\"why\":\"no\"}\n");
        assert_eq!(text(line(&Complaint::new("held\n"))), "{\"unusable\":\"held\"}\n");
        let listed = Listed {
            function: "unix:/a".into(),
            state: Standing::Free,
            vm: None,
            pid: None,
            uid: None,
            since: 7,
            why: None,
        };
        let list = Reply::List { version: 1, functions: vec![listed] };
        assert_eq!(
            text(line(&list)),
            "{\"answer\":\"list\",\"version\":1,\"functions\":[{\"function\":\"unix:/a\",\"state\":\"free\",\"since\":7}]}\n"
        );
    }

    #[test]
    fn what_is_no_request_is_refused_in_words() {
        for (line, why) in [
            (&b""[..], "no record"),
            (b"[]", "no record"),
            (b"{\"ask\":\"list\"}", "no record"),
            (b"{\"ask\":\"list\",\"version\":2,\"new\":[]}", "version 2 of the pool's protocol"),
            (b"{\"ask\":\"steal\",\"version\":1}", "the request is none"),
            (b"{\"ask\":\"list\",\"version\":1,\"more\":1}", "the request is none"),
            (b"{\"ask\":\"function\",\"version\":1}", "the request is none"),
            (b"{\"ask\":\"function\",\"version\":1,\"vm\":\"\"}", "a VM's name"),
            (b"{\"ask\":\"function\",\"version\":1,\"vm\":\"a\\nb\"}", "a VM's name"),
            (b"\xff\xfe", "no record"),
        ] {
            let said = Request::parse(line).unwrap_err();
            assert!(said.starts_with(why), "{}: {said}", String::from_utf8_lossy(line));
        }
        let deep = [b"{\"version\":1,\"vm\":".to_vec(), vec![b'['; 2000]].concat();
        Request::parse(&deep).unwrap_err();
    }

    proptest! {
        #[test]
        fn bytes_are_understood_or_refused(bytes: Vec<u8>) {
            let _ = (Request::parse(&bytes), Reply::parse(&bytes), Complaint::parse(&bytes));
        }

        #[test]
        fn a_complaint_is_always_understood(why: String) {
            let complaint = Complaint::new(&why);
            prop_assert_eq!(Complaint::parse(&line(&complaint)), Some(complaint));
        }
    }
}
