//! Frames between host and device (Serial ATA 3 §10.3).

use super::registers::SIG_ATAPI;

/// Types.
const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const PIO_SETUP: u8 = 0x5f;

/// Where the HBA puts what it receives (AHCI 1.3.1 §4.2.1).
pub(super) const AT_PIO_SETUP: u64 = 0x20;
pub(super) const AT_REGISTER: u64 = 0x40;

/// A register FIS of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromHost {
    /// A command.
    Command {
        /// ATA command.
        command: u8,
        /// Its features.
        features: u8,
        /// Its count.
        count: u8,
    },
    /// The device control register: software reset on or off.
    Control {
        /// The device shall be in reset.
        reset: bool,
    },
}

impl FromHost {
    /// Reads a frame; none if it is no register FIS.
    pub(super) fn parse(bytes: &[u8; 64]) -> Option<Self> {
        match bytes {
            [HOST_TO_DEVICE, flags, command, features, ..] if flags & 0x80 != 0 => {
                Some(Self::Command { command: *command, features: *features, count: bytes[12] })
            }
            [HOST_TO_DEVICE, ..] => Some(Self::Control { reset: bytes[15] & 0b100 != 0 }),
            _ => None,
        }
    }
}

/// A device's registers as it reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TaskFile {
    pub(super) status: u8,
    pub(super) error: u8,
    /// LBA low, mid, high.
    pub(super) lba: [u8; 3],
    pub(super) count: u8,
}

impl TaskFile {
    /// What a packet device reports after a reset: its signature (ATA8-ACS §6.4).
    pub(super) fn signature() -> Self {
        let [count, low, mid, high] = SIG_ATAPI.to_le_bytes();
        Self { status: 0, error: 1, lba: [low, mid, high], count }
    }

    /// As the port's TFD register shows it.
    pub(super) fn tfd(&self) -> u32 {
        u32::from(self.error) << 8 | u32::from(self.status)
    }

    /// The register FIS.
    pub(super) fn register(&self, interrupt: bool) -> [u8; 20] {
        let mut fis = self.frame(DEVICE_TO_HOST, interrupt);
        fis[2] = self.status;
        fis
    }

    /// The PIO setup FIS for `bytes` to the host; `self` is how the device is afterwards.
    pub(super) fn pio_setup(&self, before: u8, bytes: u16) -> [u8; 20] {
        let mut fis = self.frame(PIO_SETUP, true);
        fis[1] |= 0x20;
        fis[2] = before;
        fis[15] = self.status;
        fis[16..18].copy_from_slice(&bytes.to_le_bytes());
        fis
    }

    fn frame(&self, kind: u8, interrupt: bool) -> [u8; 20] {
        let mut fis = [0; 20];
        fis[0] = kind;
        fis[1] = if interrupt { 0x40 } else { 0 };
        fis[3] = self.error;
        fis[4..7].copy_from_slice(&self.lba);
        fis[12] = self.count;
        fis
    }
}
