//! The controller's state on its way to another process. A command that is under way comes to its end before; the medium is the other
//! process's own.

use serde::{Deserialize, Serialize};

use super::cdrom::{Drive, DriveState};
use super::function::{Ahci, INDEX_BITS};
use super::port::PortState;
use super::registers::PORTS;
use crate::pci::ConfigState;
use crate::persist::{Moves, RestoreError, StateError, States, check};

const NAME: &str = "ahci";
const VERSION: u32 = 1;

/// Saved state of an [`Ahci`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct AhciState {
    config: ConfigState,
    /// The index register.
    index: u32,
    /// Ports whose interrupt was told by a message.
    told: u32,
    /// The line's level.
    high: bool,
    /// GHC: interrupts are on.
    interrupts_on: bool,
    /// IS.
    pending: u32,
    ports: Vec<SavedPort>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedPort {
    registers: PortState,
    drive: Option<SavedDrive>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedDrive {
    state: DriveState,
    /// Bytes of the medium in the tray.
    medium: Option<u64>,
}

impl SavedDrive {
    fn of(drive: &Drive) -> Self {
        Self { state: drive.state, medium: drive.medium_len() }
    }

    /// Whether `drive` can be this one: what the guest could read it must find. In an open tray there may be anything.
    fn fits(&self, drive: &Drive) -> Result<(), RestoreError> {
        let (there, here) = match (self.medium, drive.medium_len()) {
            _ if self.state.open => return Ok(()),
            (there, here) if there == here => return Ok(()),
            (there, here) => (there, here),
        };
        let medium = |len: Option<u64>| len.map_or("no medium".to_owned(), |len| format!("a medium of {len} bytes"));
        let (name, there, here) = (&drive.name, medium(there), medium(here));
        let what = format!("CD-ROM drive '{name}' has {there} at the source, and {here} here: give it the same image");
        Err(RestoreError::new(NAME, what))
    }
}

impl Ahci {
    fn save(&self) -> AhciState {
        let hba = self.shared.hba();
        let ports = hba.ports.iter();
        let port = |port: &super::port::Port| SavedPort {
            registers: port.state.clone(),
            drive: port.drive.as_ref().map(SavedDrive::of),
        };
        AhciState {
            config: self.config.save(),
            index: self.index,
            told: self.told,
            high: self.high,
            interrupts_on: hba.interrupts_on,
            pending: hba.pending,
            ports: ports.map(port).collect(),
        }
    }

    fn restore(&mut self, state: &AhciState) -> Result<(), RestoreError> {
        let AhciState { ref config, index, told, high, interrupts_on, pending, ref ports } = *state;
        check(ports.len() == PORTS, NAME, "another number of ports")?;
        check((told | pending) >> PORTS == 0, NAME, "interrupts of ports that there are not")?;
        check(index & !INDEX_BITS == 0, NAME, "an index that there is not")?;
        let mut hba = self.shared.hba();
        for (n, (port, saved)) in hba.ports.iter().zip(ports).enumerate() {
            match (&port.drive, &saved.drive) {
                (None, None) => {}
                (Some(drive), Some(saved)) => saved.fits(drive)?,
                (Some(drive), None) => {
                    let what = format!("CD-ROM drive '{}' is not at the source: start this VM without it", drive.name);
                    return Err(RestoreError::new(NAME, what));
                }
                (None, Some(_)) => {
                    let what = format!("there is a drive on SATA port {n} at the source, and none here: add one");
                    return Err(RestoreError::new(NAME, what));
                }
            }
            check(saved.registers.is_sound(port.drive.is_some()), NAME, "a port's registers that can't be")?;
        }
        check(self.config.restore(config), NAME, "no configuration space of the controller")?;
        (hba.interrupts_on, hba.pending) = (interrupts_on, pending);
        // From here on the thread would find work.
        hba.halted = true;
        for (port, saved) in hba.ports.iter_mut().zip(ports) {
            port.state = saved.registers.clone();
            if let (Some(drive), Some(saved)) = (&mut port.drive, &saved.drive) {
                drive.state = saved.state;
            }
        }
        drop(hba);
        (self.index, self.told) = (index, told);
        self.connect();
        if high != self.high {
            self.high = high;
            self.line.set(high);
        }
        Ok(())
    }
}

impl Moves for Ahci {
    fn halt(&mut self) {
        self.shared.hba().halted = true;
    }

    fn is_halted(&mut self) -> bool {
        let hba = self.shared.hba();
        hba.halted && !hba.busy
    }

    fn go_on(&mut self) {
        self.shared.hba().halted = false;
        self.shared.work.notify_one();
    }

    fn save_into(&self, at: &str, states: &mut States) {
        states.put(NAME, at, VERSION, &self.save());
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        let state = states.take(NAME, at, VERSION)?;
        Ok(self.restore(&state)?)
    }
}
