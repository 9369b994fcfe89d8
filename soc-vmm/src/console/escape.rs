//! What a person types on a raw terminal: bytes for the guest, and Ctrl-A commands for soc-vmm.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// What a byte meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// It goes to the guest.
    Guest(u8),
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h.
    Help,
    /// The prefix, or an unknown command.
    Nothing,
}

/// Tells commands from input.
#[derive(Clone, Debug, Default)]
pub struct Escapes {
    after_prefix: bool,
}

impl Escapes {
    /// What Ctrl-A h shows.
    pub const HELP: &'static str = "\r\nCtrl-A x: end the VM   Ctrl-A h: this help   Ctrl-A Ctrl-A: send Ctrl-A";

    /// Takes the next byte.
    pub fn take(&mut self, byte: u8) -> Typed {
        if !std::mem::replace(&mut self.after_prefix, false) {
            if byte != PREFIX {
                return Typed::Guest(byte);
            }
            self.after_prefix = true;
            return Typed::Nothing;
        }
        match byte {
            PREFIX => Typed::Guest(PREFIX),
            b'x' | b'X' => Typed::Quit,
            b'h' | b'H' | b'?' => Typed::Help,
            _ => Typed::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(bytes: &[u8]) -> Vec<Typed> {
        let mut escapes = Escapes::default();
        bytes.iter().map(|b| escapes.take(*b)).filter(|typed| *typed != Typed::Nothing).collect()
    }

    #[test]
    fn commands_come_after_the_prefix_only() {
        assert_eq!(
            all(b"x\x01xh\x01h\x01\x01x\x01qx"),
            [
                Typed::Guest(b'x'),
                Typed::Quit,
                Typed::Guest(b'h'),
                Typed::Help,
                Typed::Guest(1),
                Typed::Guest(b'x'),
                Typed::Guest(b'x')
            ]
        );
    }

    proptest! {
        /// Every byte can be sent, by doubling Ctrl-A.
        #[test]
        fn everything_can_be_sent(bytes in prop::collection::vec(0u8..4, 0..40)) {
            let typed: Vec<u8> = bytes.iter().flat_map(|b| if *b == PREFIX { vec![PREFIX, PREFIX] } else { vec![*b] }).collect();
            prop_assert_eq!(all(&typed), bytes.into_iter().map(Typed::Guest).collect::<Vec<_>>());
        }
    }
}
