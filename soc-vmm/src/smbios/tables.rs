//! The structures (DSP0134 §7).

use super::SmbiosConfig;
use super::structure::Structure;
use crate::layout::FOUR_GIB;

// Handles.
const FIRMWARE: u16 = 0x0000;
const SYSTEM: u16 = 0x0100;
const CHASSIS: u16 = 0x0300;
const PROCESSOR: u16 = 0x0400;
const ARRAY: u16 = 0x1000;
const DEVICE: u16 = 0x1100;
const MAPPED: u16 = 0x1300;
const BOOT: u16 = 0x2000;
const END: u16 = 0x7f00;
/// No handle; no error information.
const NO_HANDLE: u16 = 0xffff;
const NO_ERRORS: u16 = 0xfffe;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// A memory device holds so much, or more where there would be too many of them.
const DEVICE_LEN: u64 = 16 * GIB;
const DEVICES_MAX: u64 = 16;

/// All of them; `firmware`: one about firmware too, which there is none to tell of.
pub(super) fn structures(config: &SmbiosConfig, firmware: bool) -> Vec<u8> {
    let mut all = if firmware { vec![no_firmware()] } else { Vec::new() };
    all.extend([system(config), chassis(config)]);
    all.extend((0..config.processors.sockets).map(|socket| processor(config, socket)));
    all.extend(memory(config));
    // §7.33: the system booted without errors. §7.45: the end.
    all.push(Structure::new(32, BOOT).bytes(&[0; 7]).end());
    all.push(Structure::new(127, END).end());
    all.concat()
}

/// §7.1.
fn no_firmware() -> Vec<u8> {
    const NO_CHARACTERISTICS: u64 = 1 << 3;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    Structure::new(0, FIRMWARE)
        .string("Outboard")
        .string(env!("CARGO_PKG_VERSION"))
        // Segment.
        .u16(0)
        .string("01/01/2026")
        // ROM's size.
        .u8(0)
        .u64(NO_CHARACTERISTICS)
        .bytes(&[0, VIRTUAL_MACHINE])
        // Releases: of this, of an embedded controller.
        .bytes(&[0, 1, 0xff, 0xff])
        .u16(0)
        .end()
}

/// §7.2.
fn system(config: &SmbiosConfig) -> Vec<u8> {
    const POWER_SWITCH: u8 = 6;
    let names = &config.system;
    // The first three fields of the UUID are little-endian (§7.2.1).
    let mut uuid = config.uuid;
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    Structure::new(1, SYSTEM)
        .string(&names.manufacturer)
        .string(&names.product)
        .string(&names.version)
        .string(&names.serial)
        .bytes(&uuid)
        .u8(POWER_SWITCH)
        .string(&names.sku)
        .string(&names.family)
        .end()
}

/// §7.4.
fn chassis(config: &SmbiosConfig) -> Vec<u8> {
    const OTHER: u8 = 1;
    const SAFE: u8 = 3;
    const UNKNOWN: u8 = 2;
    Structure::new(3, CHASSIS)
        .string(&config.system.manufacturer)
        .u8(OTHER)
        .string(&config.system.version)
        .string("")
        .string("")
        // Boot-up, power supply, thermal, security.
        .bytes(&[SAFE, SAFE, SAFE, UNKNOWN])
        .u32(0)
        // Height, power cords, contained elements.
        .bytes(&[0; 4])
        .string("")
        .end()
}

/// §7.5.
fn processor(config: &SmbiosConfig, socket: u16) -> Vec<u8> {
    const CENTRAL: u8 = 3;
    const OTHER: u8 = 1;
    /// The family is in the wider field.
    const FAMILY_2: u8 = 0xfe;
    /// Populated, enabled.
    const IN_USE: u8 = 1 << 6 | 1;
    const CAPABLE_64_BIT: u16 = 1 << 2;
    let processors = &config.processors;
    let [signature, features] = processors.signature;
    let narrow = |count: u16| u8::try_from(count).unwrap_or(0xff);
    let (cores, threads) = (processors.cores, processors.threads);
    Structure::new(4, PROCESSOR.wrapping_add(socket))
        .string(&format!("CPU {socket}"))
        .u8(CENTRAL)
        .u8(FAMILY_2)
        .string(&processors.manufacturer)
        .u32(signature)
        .u32(features)
        .string(&processors.version)
        // Voltage and clocks are unknown.
        .u8(0)
        .u16(0)
        .u16(0)
        .u16(0)
        .u8(IN_USE)
        .u8(OTHER)
        // Caches are told of by CPUID alone.
        .u16(NO_HANDLE)
        .u16(NO_HANDLE)
        .u16(NO_HANDLE)
        .string("")
        .string("")
        .string("")
        .bytes(&[narrow(cores), narrow(cores), narrow(threads)])
        .u16(CAPABLE_64_BIT)
        .u16(OTHER.into())
        .u16(cores)
        .u16(cores)
        .u16(threads)
        .end()
}

/// The array of memory devices, the devices, and where the array is in the address space (§7.17, §7.18, §7.20).
fn memory(config: &SmbiosConfig) -> Vec<Vec<u8>> {
    let layout = &config.memory;
    let ram = layout.ram();
    let device = ram.div_ceil(DEVICES_MAX).next_multiple_of(DEVICE_LEN).max(DEVICE_LEN);
    let devices: Vec<u64> = (0..ram.div_ceil(device)).map(|n| device.min(ram - n * device)).collect();
    let mut all = vec![array(ram, devices.len() as u16)];
    all.extend((0..).zip(&devices).map(|(n, &len)| memory_device(n, len)));
    let low = (0, layout.low_end());
    let high = (FOUR_GIB, layout.high_end());
    let ranges = [low, high].into_iter().filter(|(start, end)| start < end);
    all.extend((0..).zip(ranges).map(|(n, (start, end))| mapped(n, start, end)));
    all
}

fn array(ram: u64, devices: u16) -> Vec<u8> {
    const ON_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const MULTI_BIT_ECC: u8 = 6;
    /// The wider field tells.
    const EXTENDED: u32 = 1 << 31;
    let kib = u32::try_from(ram / KIB).ok().filter(|kib| *kib < EXTENDED);
    Structure::new(16, ARRAY)
        .bytes(&[ON_BOARD, SYSTEM_MEMORY, MULTI_BIT_ECC])
        .u32(kib.unwrap_or(EXTENDED))
        .u16(NO_ERRORS)
        .u16(devices)
        .u64(if kib.is_some() { 0 } else { ram })
        .end()
}

fn memory_device(n: u16, len: u64) -> Vec<u8> {
    const UNKNOWN: u16 = 0xffff;
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    const OTHER: u16 = 1 << 1;
    /// The wider field tells.
    const EXTENDED: u16 = 0x7fff;
    // A device of less than 1 MiB more than it tells is not told of.
    let mib = len / MIB;
    let narrow = u16::try_from(mib).ok().filter(|mib| *mib < EXTENDED);
    Structure::new(17, DEVICE + n)
        .u16(ARRAY)
        .u16(NO_ERRORS)
        // Widths.
        .u16(UNKNOWN)
        .u16(UNKNOWN)
        .u16(narrow.unwrap_or(EXTENDED))
        .u8(DIMM)
        .u8(0)
        .string(&format!("DIMM {n}"))
        .string("")
        .u8(RAM)
        .u16(OTHER)
        // Speed.
        .u16(0)
        .string("Outboard")
        .string("")
        .string("")
        .string("")
        // Ranks.
        .u8(0)
        .u32(if narrow.is_some() { 0 } else { mib as u32 })
        // Configured speed, voltages.
        .bytes(&[0; 8])
        .end()
}

fn mapped(n: u16, start: u64, end: u64) -> Vec<u8> {
    /// The wider fields tell.
    const EXTENDED: u32 = u32::MAX;
    let kib = u32::try_from(start / KIB).ok().zip(u32::try_from((end - 1) / KIB).ok());
    let kib = kib.filter(|(start, end)| *start < EXTENDED && *end < EXTENDED);
    let narrow = kib.unwrap_or((EXTENDED, EXTENDED));
    let wide = if kib.is_some() { (0, 0) } else { (start, end - 1) };
    Structure::new(19, MAPPED + n)
        .u32(narrow.0)
        .u32(narrow.1)
        .u16(ARRAY)
        // Devices of a row.
        .u8(1)
        .u64(wide.0)
        .u64(wide.1)
        .end()
}
