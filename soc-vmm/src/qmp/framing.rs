//! Where one JSON value ends in a stream of bytes.
//!
//! QMP clients send JSON values one after another; a newline between them is custom, not rule. The framer finds a value's end
//! by its brackets and keeps at most [`MAX_COMMAND`] bytes. It finds its way back after nonsense: a control character inside a
//! string, or the byte 0xFF anywhere (neither can be in JSON), ends what was begun.

/// Longest command in bytes.
pub const MAX_COMMAND: usize = 1 << 20;

/// Why bytes are not a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Text that starts no object; it was skipped up to the next object or line.
    #[error("JSON parse error, expecting an object")]
    NotAnObject,
    /// A value that was broken off; it was dropped.
    #[error("JSON parse error, a value was broken off")]
    BrokenOff,
    /// A value of more than [`MAX_COMMAND`] bytes. The stream can't be followed any further.
    #[error("JSON parse error, a command is longer than {MAX_COMMAND} bytes")]
    TooLong,
}

/// Splits a stream into JSON objects (and what claims to be one).
#[derive(Debug, Default)]
pub struct Framer {
    value: Vec<u8>,
    place: Place,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Between values.
    #[default]
    Outside,
    /// In text that is no object, already reported.
    Nonsense,
    /// In a value, this many brackets deep.
    Inside { depth: usize },
    /// In a string of a value; `escaped`: after a backslash.
    String { depth: usize, escaped: bool },
}

impl Framer {
    /// Takes bytes off the front of `input` up to the end of the next value and gives that; `None`: all taken, no value ends.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Vec<u8>, FrameError>> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            if let Some(found) = self.take(byte) {
                return Some(found);
            }
        }
        None
    }

    fn take(&mut self, byte: u8) -> Option<Result<Vec<u8>, FrameError>> {
        let next = match (self.place, byte) {
            (Place::Outside | Place::Nonsense, b'{') => Place::Inside { depth: 1 },
            (Place::Outside | Place::Nonsense, b'\n') => Place::Outside,
            (Place::Outside, b' ' | b'\t' | b'\r' | 0xff) => Place::Outside,
            (Place::Outside, _) => {
                self.place = Place::Nonsense;
                return Some(Err(FrameError::NotAnObject));
            }
            (Place::Nonsense, _) => Place::Nonsense,
            (_, 0xff) | (Place::String { .. }, 0..0x20) => return Some(Err(self.reset(FrameError::BrokenOff))),
            (Place::Inside { depth }, b'{' | b'[') => Place::Inside { depth: depth + 1 },
            (Place::Inside { depth }, b'}' | b']') => Place::Inside { depth: depth - 1 },
            (Place::Inside { depth }, b'"') => Place::String { depth, escaped: false },
            (Place::String { depth, escaped: false }, b'"') => Place::Inside { depth },
            (Place::String { depth, escaped }, b) => Place::String { depth, escaped: !escaped && b == b'\\' },
            (inside @ Place::Inside { .. }, _) => inside,
        };
        self.place = next;
        match next {
            Place::Outside | Place::Nonsense => None,
            _ if self.value.len() == MAX_COMMAND => Some(Err(self.reset(FrameError::TooLong))),
            Place::Inside { depth: 0 } => {
                self.value.push(byte);
                self.place = Place::Outside;
                Some(Ok(std::mem::take(&mut self.value)))
            }
            _ => {
                self.value.push(byte);
                None
            }
        }
    }

    fn reset(&mut self, why: FrameError) -> FrameError {
        *self = Self::default();
        why
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(mut input: &[u8]) -> Vec<Result<String, FrameError>> {
        let mut framer = Framer::default();
        std::iter::from_fn(|| framer.next(&mut input)).map(|f| f.map(|v| String::from_utf8(v).unwrap())).collect()
    }

    #[test]
    fn values_need_no_newline_and_may_have_many() {
        let stream = "{\"a\":1}{\"b\":\n[{}]}\r\n\n {\"c\":\"}{\\\"\"}";
        assert_eq!(
            frames(stream.as_bytes()),
            [Ok("{\"a\":1}".into()), Ok("{\"b\":\n[{}]}".into()), Ok("{\"c\":\"}{\\\"\"}".into())]
        );
    }

    #[test]
    fn nonsense_is_told_once_and_skipped() {
        assert_eq!(frames(b"help me\n{}"), [Err(FrameError::NotAnObject), Ok("{}".into())]);
        assert_eq!(frames(b"]]]{}"), [Err(FrameError::NotAnObject), Ok("{}".into())]);
        assert_eq!(frames(b"{\"a\": \"unfinished\n{\"b\":1}"), [Err(FrameError::BrokenOff), Ok("{\"b\":1}".into())]);
        assert_eq!(frames(b"{\"a\": [\xff{}\xff"), [Err(FrameError::BrokenOff), Ok("{}".into())]);
    }

    #[test]
    fn a_command_has_its_longest_length_exactly() {
        let longest = format!("{{\"a\":\"{}\"}}", "x".repeat(MAX_COMMAND - 8));
        assert_eq!(longest.len(), MAX_COMMAND);
        assert_eq!(frames(longest.as_bytes()), [Ok(longest.clone())]);
        let longer = longest.replacen('x', "xx", 1);
        assert_eq!(frames(longer.as_bytes())[0], Err(FrameError::TooLong));
    }

    proptest! {
        /// However the stream is cut into reads, the same frames come out; and any JSON objects come out as they went in.
        #[test]
        fn cuts_do_not_matter(
            objects in prop::collection::vec(prop::collection::btree_map(".{0,6}", ".{0,6}", 0..4), 1..5),
            cut in 1usize..9,
        ) {
            let sent: Vec<String> = objects.iter().map(|o| serde_json::to_string(o).unwrap()).collect();
            let stream = sent.concat();
            let mut framer = Framer::default();
            let mut got = Vec::new();
            for mut piece in stream.as_bytes().chunks(cut) {
                while let Some(frame) = framer.next(&mut piece) {
                    got.push(String::from_utf8(frame.unwrap()).unwrap());
                }
            }
            prop_assert_eq!(got, sent);
        }

        /// After any bytes at all, 0xFF and a newline bring the framer back.
        #[test]
        fn any_bytes_can_be_recovered_from(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut framer = Framer::default();
            let stream = [&bytes[..], b"\xff\n{\"ok\":1}"].concat();
            let mut input = &stream[..];
            let mut last = None;
            while let Some(frame) = framer.next(&mut input) {
                last = Some(frame);
            }
            prop_assert_eq!(last, Some(Ok(b"{\"ok\":1}".to_vec())));
        }
    }
}
