//! What the CMOS RAM tells firmware about the machine, as SeaBIOS reads it (its `src/hw/rtc.h`; QEMU writes the same).

/// Bytes of CMOS RAM.
pub(super) const LEN: usize = 128;

/// What a machine tells its firmware by CMOS RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cmos {
    /// Bytes of RAM from address 0 to the hole below 4 GiB.
    pub ram_below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub ram_above_4g: u64,
    /// vCPUs at boot, at least 1. Firmware learns counts above 256 otherwise.
    pub cpus: u16,
    /// Boot order, first to third.
    pub boot: [Option<BootDevice>; 3],
}

/// A boot device as CMOS RAM codes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BootDevice {
    /// The first floppy.
    Floppy = 1,
    /// The first disk.
    Disk = 2,
    /// The first CD-ROM.
    CdRom = 3,
    /// The network.
    Network = 4,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

impl Cmos {
    pub(super) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        // Equipment: a mathematics coprocessor.
        bytes[0x14] = 0x02;
        // KiB below 640 KiB.
        put(&mut bytes, [0x15, 0x16], (self.ram_below_4g / KIB).min(640));
        // KiB above 1 MiB, twice.
        let extended = (self.ram_below_4g.saturating_sub(MIB) / KIB).min(0xffff);
        put(&mut bytes, [0x17, 0x18], extended);
        put(&mut bytes, [0x30, 0x31], extended);
        // 64 KiB units above 16 MiB.
        put(&mut bytes, [0x34, 0x35], (self.ram_below_4g.saturating_sub(16 * MIB) / (64 * KIB)).min(0xffff));
        // 64 KiB units above 4 GiB.
        put(&mut bytes, [0x5b, 0x5c, 0x5d], (self.ram_above_4g / (64 * KIB)).min(0xff_ffff));
        count_cpus(&mut bytes, self.cpus.into());
        let [first, second, third] = self.boot.map(|device| device.map_or(0, |device| device as u8));
        bytes[0x3d] = first | second << 4;
        // Bit 0: no test of the floppy's boot signature.
        bytes[0x38] = third << 4;
        bytes
    }
}

/// vCPUs beside the first; 0 where they don't fit.
pub(super) fn count_cpus(bytes: &mut [u8; LEN], cpus: usize) {
    bytes[0x5f] = u8::try_from(cpus.saturating_sub(1)).unwrap_or(0);
}

/// Puts `value`, little-endian, at `at`.
fn put<const N: usize>(bytes: &mut [u8; LEN], at: [usize; N], value: u64) {
    for (at, byte) in at.into_iter().zip(value.to_le_bytes()) {
        bytes[at] = byte;
    }
}
