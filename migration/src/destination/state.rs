//! The state that comes, until it is all there.

use std::collections::HashSet;

use crate::stream::Record;
use crate::{DeviceState, MigrationError, State};

/// The most of it, in bytes.
const MOST: usize = 64 << 20;
/// What a piece of it costs besides its bytes, so that there is a most of those too.
const PIECE: usize = 64;

/// What has come.
#[derive(Default)]
pub(super) struct Collected {
    state: State,
    names: HashSet<String>,
    bytes: usize,
}

impl Collected {
    /// Adds a piece, if the record is one; whether it is.
    pub(super) fn add(&mut self, record: &Record<'_>) -> Result<bool, MigrationError> {
        match record {
            Record::Device { name, version, state } => {
                self.counts(name.len() + state.len())?;
                if !self.names.insert((*name).to_owned()) {
                    return Err(MigrationError::Twice { name: (*name).to_owned() });
                }
                self.state.devices.push(DeviceState {
                    name: (*name).to_owned(),
                    version: *version,
                    state: state.to_vec(),
                });
            }
            Record::Guest { vcpu, records } => {
                self.counts(records.len())?;
                self.state.guest.push((*vcpu, records.to_vec()));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn state(self) -> State {
        self.state
    }

    fn counts(&mut self, bytes: usize) -> Result<(), MigrationError> {
        self.bytes += bytes + PIECE;
        if self.bytes > MOST { Err(MigrationError::TooMuchState { most: MOST }) } else { Ok(()) }
    }
}
