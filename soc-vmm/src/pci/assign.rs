//! Numbers buses and places windows, where no firmware does it: through the same registers, in one pass.
//!
//! Every window gets its place and every function answers, so that a kernel finds the machine as firmware would have left it.

use super::bar::{Bar, Space};
use super::config::{ConfigSpace, command, header};
use super::fabric::{Fabric, NodeId, is_bridge};
use super::function::PciFunction;
use crate::layout::IO_APIC;

/// Where windows may be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Apertures {
    /// Ports: first, and first behind.
    pub io: (u64, u64),
    /// Memory below 4 GiB.
    pub memory: (u64, u64),
    /// Memory above 4 GiB.
    pub high: (u64, u64),
}

impl Apertures {
    /// Those of a machine whose memory above 4 GiB ends at `high_end`, with 16 GiB for prefetchable windows.
    pub fn above(high_end: u64) -> Self {
        let high = high_end.next_multiple_of(1 << 30);
        Self { io: (0x6000, 0x1_0000), memory: (0xc000_0000, IO_APIC), high: (high, high + (16 << 30)) }
    }
}

/// Least sizes of a bridge's windows, so that something can be plugged in later. Of ports there are few: a bridge with nothing behind it that
/// has some goes without where they are used up, as with a PC's firmware.
const BRIDGE_IO: u64 = 0x1000;
const BRIDGE_MEMORY: u64 = 2 << 20;
const BRIDGE_HIGH: u64 = 4 << 20;

/// Why the windows found no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the PCI devices' registers need more address space than there is below {end:#x}: give the VM fewer devices")]
pub struct NoRoom {
    /// Where the aperture ends.
    end: u64,
}

/// Takes addresses upwards.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    next: u64,
    end: u64,
}

impl Cursor {
    fn of((next, end): (u64, u64)) -> Self {
        Self { next, end }
    }

    fn take(&mut self, size: u64, align: u64) -> Result<u64, NoRoom> {
        let start = self.next.next_multiple_of(align);
        self.next = start.checked_add(size).filter(|next| *next <= self.end).ok_or(NoRoom { end: self.end })?;
        Ok(start)
    }
}

/// Whether a function's windows fit behind a bridge as it is where nothing is plugged in, so that nothing else moves for them.
pub(super) fn fits_a_bridge(config: &ConfigSpace) -> bool {
    let aperture = |size| Cursor::of((0, size));
    let (io, memory, high) = (aperture(BRIDGE_IO), aperture(BRIDGE_MEMORY), aperture(BRIDGE_HIGH));
    place_bars(config, &mut Cursors { io, memory, high, bus: 0 }).is_ok()
}

struct Cursors {
    io: Cursor,
    memory: Cursor,
    high: Cursor,
    bus: u8,
}

impl Fabric {
    /// Numbers every bus and places every window, and lets every function answer.
    ///
    /// # Errors
    /// They don't fit.
    pub fn assign(&mut self, apertures: &Apertures) -> Result<(), NoRoom> {
        let mut cursors = Cursors {
            io: Cursor::of(apertures.io),
            memory: Cursor::of(apertures.memory),
            high: Cursor::of(apertures.high),
            bus: 0,
        };
        self.assign_bus(None, 0, &mut cursors)?;
        self.settle();
        Ok(())
    }

    fn assign_bus(&mut self, parent: Option<NodeId>, bus: u8, cursors: &mut Cursors) -> Result<(), NoRoom> {
        let mut here: Vec<_> =
            self.nodes().filter(|(_, p, _)| *p == parent).map(|(id, _, devfn)| (devfn, id)).collect();
        here.sort_unstable();
        let mut bridges = Vec::new();
        for (_, id) in here {
            let Some(function) = self.function(id) else { continue };
            if is_bridge(function.config()) {
                bridges.push(id);
            } else {
                assign_bars(function.config_mut(), cursors)?;
                enable(function);
            }
        }
        // What is there comes before what may come.
        bridges.into_iter().try_for_each(|id| self.assign_bridge(id, bus, cursors))
    }

    fn assign_bridge(&mut self, id: NodeId, primary: u8, cursors: &mut Cursors) -> Result<(), NoRoom> {
        let secondary = cursors.bus.checked_add(1).ok_or(NoRoom { end: 256 })?;
        cursors.bus = secondary;
        if let Some(bridge) = self.function(id) {
            bridge.config_mut().put(0x18, &[primary, secondary, 0xff]);
        }
        let start = [
            cursors.io.take(0, BRIDGE_IO)?,
            cursors.memory.take(0, BRIDGE_MEMORY)?,
            cursors.high.take(0, BRIDGE_HIGH)?,
        ];
        self.assign_bus(Some(id), secondary, cursors)?;
        let close = |cursor: &mut Cursor, start: u64, least: u64| {
            let used = cursor.next - start;
            cursor.take(if used == 0 { least } else { 0 }, least)
        };
        let has_ports = match close(&mut cursors.io, start[0], BRIDGE_IO) {
            Ok(_) => true,
            Err(_) if cursors.io.next == start[0] => false,
            Err(e) => return Err(e),
        };
        close(&mut cursors.memory, start[1], BRIDGE_MEMORY)?;
        close(&mut cursors.high, start[2], BRIDGE_HIGH)?;
        let last = [cursors.io.next - 1, cursors.memory.next - 1, cursors.high.next - 1];
        let Some(bridge) = self.function(id) else { return Ok(()) };
        let config = bridge.config_mut();
        config.put(0x1a, &[cursors.bus]);
        // One that ends before it begins is none.
        let ports = if has_ports { [(start[0] >> 8) as u8, (last[0] >> 8) as u8] } else { [0xf0, 0] };
        config.put(0x1c, &ports.map(|byte| byte & 0xf0 | 1));
        config.put(0x20, &[(start[1] >> 16) as u16, (last[1] >> 16) as u16 & 0xfff0].map(u16::to_le_bytes).concat());
        let prefetchable = [(start[2] >> 16) as u16 | 1, (last[2] >> 16) as u16 & 0xfff0 | 1];
        config.put(0x24, &prefetchable.map(u16::to_le_bytes).concat());
        config.put(0x28, &[(start[2] >> 32) as u32, (last[2] >> 32) as u32].map(u32::to_le_bytes).concat());
        enable(bridge);
        Ok(())
    }
}

/// Finds places for the BARs of an endpoint, the largest first, each at a multiple of its size.
fn place_bars(config: &ConfigSpace, cursors: &mut Cursors) -> Result<Vec<(usize, Bar, u64)>, NoRoom> {
    let mut bars: Vec<(usize, Bar)> = config.bars().map(|(index, bar, _)| (index, bar)).collect();
    bars.sort_by_key(|(_, bar)| std::cmp::Reverse(bar.size));
    let place = |(index, bar): (usize, Bar)| {
        let cursor = match bar.space {
            Space::Io => &mut cursors.io,
            Space::Memory64 if bar.prefetchable => &mut cursors.high,
            Space::Memory32 | Space::Memory64 => &mut cursors.memory,
        };
        Ok((index, bar, cursor.take(bar.size, bar.size)?))
    };
    bars.into_iter().map(place).collect()
}

/// Places the BARs of an endpoint.
fn assign_bars(config: &mut ConfigSpace, cursors: &mut Cursors) -> Result<(), NoRoom> {
    for (index, bar, base) in place_bars(config, cursors)? {
        let at = header::BAR0 + 4 * index as u16;
        config.put(at, &(base as u32 | bar.flags()).to_le_bytes());
        if bar.space == Space::Memory64 {
            config.put(at + 4, &((base >> 32) as u32).to_le_bytes());
        }
    }
    Ok(())
}

/// As firmware does it: the function hears of it.
fn enable(function: &mut dyn PciFunction) {
    let on = function.config().command() | command::IO | command::MEMORY | command::BUS_MASTER;
    function.write_config(header::COMMAND, 2, on.into());
}
