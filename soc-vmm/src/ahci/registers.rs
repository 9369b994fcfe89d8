//! Registers of an HBA and of its ports (AHCI 1.3.1 §3).

/// Ports.
pub(super) const PORTS: usize = 6;
/// Command slots of a port.
pub(super) const SLOTS: u32 = 32;

/// Where the ports' registers begin, and how far they are apart.
pub(super) const PORT_BASE: u64 = 0x100;
pub(super) const PORT_STRIDE: u64 = 0x80;

// Generic host control (§3.1).
pub(super) const CAP: u64 = 0x00;
pub(super) const GHC: u64 = 0x04;
pub(super) const IS: u64 = 0x08;
pub(super) const PI: u64 = 0x0c;
pub(super) const VS: u64 = 0x10;

/// Ports and slots, 64-bit addresses, AHCI only, first generation SATA, command list override; no native queuing, since no disk is
/// there to queue for.
pub(super) const CAP_VALUE: u32 = (PORTS as u32 - 1) | (SLOTS - 1) << 8 | 1 << 31 | 1 << 24 | 1 << 18 | 1 << 20;
/// AHCI 1.3.1.
pub(super) const VS_VALUE: u32 = 0x1_0301;

/// Global control: HBA reset, interrupts, AHCI mode (which is the only one).
pub(super) mod ghc {
    pub(in super::super) const RESET: u32 = 1 << 0;
    pub(in super::super) const INTERRUPTS: u32 = 1 << 1;
    pub(in super::super) const AHCI: u32 = 1 << 31;
}

/// A port's registers (§3.3), from its first one on.
pub(super) mod port {
    pub(in super::super) const CLB: u64 = 0x00;
    pub(in super::super) const CLBU: u64 = 0x04;
    pub(in super::super) const FB: u64 = 0x08;
    pub(in super::super) const FBU: u64 = 0x0c;
    pub(in super::super) const IS: u64 = 0x10;
    pub(in super::super) const IE: u64 = 0x14;
    pub(in super::super) const CMD: u64 = 0x18;
    pub(in super::super) const TFD: u64 = 0x20;
    pub(in super::super) const SIG: u64 = 0x24;
    pub(in super::super) const SSTS: u64 = 0x28;
    pub(in super::super) const SCTL: u64 = 0x2c;
    pub(in super::super) const SERR: u64 = 0x30;
    pub(in super::super) const SACT: u64 = 0x34;
    pub(in super::super) const CI: u64 = 0x38;
}

/// A port's interrupts (§3.3.5).
pub(super) mod interrupt {
    /// A register FIS arrived.
    pub(in super::super) const REGISTER: u32 = 1 << 0;
    /// A PIO setup FIS arrived, and its data.
    pub(in super::super) const PIO_SETUP: u32 = 1 << 1;
    /// A marked PRD was done.
    pub(in super::super) const PRD: u32 = 1 << 5;
    /// Follows SERR's X: the link came up.
    pub(in super::super) const CONNECT: u32 = 1 << 6;
    /// More data than PRDs.
    pub(in super::super) const OVERFLOW: u32 = 1 << 24;
    /// Fatal: the interface; what was sent is no command.
    pub(in super::super) const INTERFACE: u32 = 1 << 27;
    /// Fatal: an address that is no memory.
    pub(in super::super) const HOST_BUS: u32 = 1 << 29;
    /// Fatal: the device reports an error.
    pub(in super::super) const TASK_FILE: u32 = 1 << 30;
    /// Those that can be switched on.
    pub(in super::super) const ALL: u32 = 0xfdc0_00ff;
}

/// A port's command register (§3.3.7).
pub(super) mod cmd {
    pub(in super::super) const START: u32 = 1 << 0;
    /// Spun up and powered: ports that don't stagger show it always.
    pub(in super::super) const UP: u32 = 1 << 1 | 1 << 2;
    pub(in super::super) const OVERRIDE: u32 = 1 << 3;
    pub(in super::super) const FIS_RECEIVE: u32 = 1 << 4;
    pub(in super::super) const FIS_RUNNING: u32 = 1 << 14;
    pub(in super::super) const LIST_RUNNING: u32 = 1 << 15;
    /// Start, FIS receive, and what is only kept: device is ATAPI, drive LED.
    pub(in super::super) const WRITABLE: u32 = START | FIS_RECEIVE | 1 << 24 | 1 << 25;
}

/// Status of a device (ATA8-ACS §6.2.9).
pub(super) mod status {
    pub(in super::super) const BUSY: u8 = 1 << 7;
    pub(in super::super) const READY: u8 = 1 << 6;
    /// Once "seek complete": set by every device.
    pub(in super::super) const SEEK: u8 = 1 << 4;
    pub(in super::super) const DATA: u8 = 1 << 3;
    /// An error; of a PACKET command: check condition.
    pub(in super::super) const ERROR: u8 = 1 << 0;
}

/// SCTL and SSTS: device detection.
pub(super) const DET: u32 = 0xf;
/// SCTL: the interface is being reset.
pub(super) const DET_RESET: u32 = 1;
/// SSTS: a device is there and talks; first generation; active.
pub(super) const LINK_UP: u32 = 0x113;
/// SERR: X, the link came up.
pub(super) const SERR_EXCHANGED: u32 = 1 << 26;
/// TFD: no device.
pub(super) const TFD_NONE: u32 = 0x7f;
/// SIG: no device; an ATAPI device.
pub(super) const SIG_NONE: u32 = u32::MAX;
pub(super) const SIG_ATAPI: u32 = 0xeb14_0101;
