//! A function's life, as either side asserts it.

/// Where a function stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No host header: nobody serves the function.
    Absent,
    /// The host stored its header and waits for a SoC.
    Offered,
    /// Both nonces are known, the channel carries.
    Negotiated,
    /// A VM exists.
    Running,
    /// The VM is held: the SoC is silent or gone, within the lease.
    Quiesced,
    /// Reset, removed, or a peer that broke the rules: only a new offer leads out.
    Lost,
}

/// A step that the table doesn't have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal {
    /// Where the function stood.
    pub from: State,
    /// Where it should have gone.
    pub to: State,
}

impl std::fmt::Display for Illegal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a function can't go from {:?} to {:?}", self.from, self.to)
    }
}

impl std::error::Error for Illegal {}

impl State {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Absent, Self::Offered, Self::Negotiated, Self::Running, Self::Quiesced, Self::Lost];

    /// Goes on to `to`.
    ///
    /// # Errors
    /// The step is not legal; the state stays.
    pub fn go(&mut self, to: Self) -> Result<(), Illegal> {
        use State::*;
        let legal = match (*self, to) {
            (_, Lost) => *self != Absent,
            (Absent | Lost, Offered) => true,
            (Offered, Negotiated) => true,
            // A new SoC nonce restarts the channel, whether or not a VM is there.
            (Negotiated, Negotiated | Running | Offered) => true,
            (Running, Running | Negotiated | Quiesced) => true,
            (Quiesced, Running | Negotiated | Offered) => true,
            (Lost, Absent) => true,
            _ => false,
        };
        if !legal {
            return Err(Illegal { from: *self, to });
        }
        *self = to;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::State;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_vm_is_reached_through_negotiation_and_never_after_a_loss(steps in prop::collection::vec(0usize..6, 0..40)) {
            let mut state = State::Absent;
            let mut negotiated_since_offer = false;
            for step in steps {
                let to = State::ALL[step];
                let before = state;
                match state.go(to) {
                    Ok(()) => {
                        prop_assert_eq!(state, to);
                        match to {
                            State::Offered | State::Lost | State::Absent => negotiated_since_offer = false,
                            State::Negotiated => negotiated_since_offer = true,
                            State::Running | State::Quiesced => prop_assert!(negotiated_since_offer),
                        }
                    }
                    Err(illegal) => {
                        prop_assert_eq!(illegal.from, before);
                        prop_assert_eq!(state, before);
                    }
                }
            }
        }
    }
}
