//! An ICH9 AHCI controller as a q35 of QEMU has one: 8086:2922 at 00:1f.2, AHCI 1.3.1, six ports that hold SATA CD-ROM drives.
//!
//! Registers are served by the thread that serves IOREQs (`hba`, `port`). Whatever touches guest memory or a medium is done by a thread of
//! the device (`worker`): it fetches a command, carries it out on the drive (`ata`, `cdrom`), moves its data (`command`) and changes
//! the port's registers; then it wakes the first thread, which interrupts the guest. A reset never waits for a medium: see `dma`.

mod ata;
mod cdrom;
mod command;
mod dma;
mod fis;
mod function;
mod handle;
mod hba;
mod port;
mod registers;
mod state;
mod worker;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::bus::Wake;

pub use cdrom::{DriveState, Sense, TrayListener};
pub use function::{AHCI, Ahci, CdDrive, Plumbing};
pub use handle::{CdHandle, InsertError, Tray, TrayClosed, TrayLocked};
pub use port::PortState;

/// Ports of the controller.
pub const PORTS: usize = registers::PORTS;

use dma::Dma;
use hba::Hba;

/// What the device's threads share.
struct Shared {
    hba: Mutex<Hba>,
    /// The device's thread waits for work there.
    work: Condvar,
    dma: Dma,
    /// Wakes the thread that serves IOREQs.
    wake: Arc<dyn Wake>,
}

impl Shared {
    fn hba(&self) -> MutexGuard<'_, Hba> {
        // A panic inside a device ends the process; a poisoned lock is met only while that goes on.
        self.hba.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
