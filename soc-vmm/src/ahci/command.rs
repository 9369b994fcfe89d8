//! A command as it lies in guest memory (AHCI 1.3.1 §4.2.2, §4.2.3): header, table, and the list of regions for its data.

use super::dma::{Pass, Refused};

const HEADER_LEN: u64 = 32;
/// Offsets within a header: the bytes that were moved.
const BYTES_MOVED: u64 = 4;
/// Offsets within a table: the packet, the list of regions.
const PACKET: usize = 0x40;
const REGIONS: u64 = 0x80;
const REGION_LEN: usize = 16;
/// Regions that are fetched at once.
const BATCH: usize = 64;

/// A command that was fetched: a copy, which the guest can't change any more.
#[derive(Debug)]
pub(super) struct Fetched {
    header: u64,
    /// The command FIS.
    pub(super) fis: [u8; 64],
    /// The packet of a PACKET command.
    pub(super) packet: [u8; 12],
    regions: u64,
    region_count: u16,
}

impl Fetched {
    /// Fetches the command of a slot.
    pub(super) fn fetch(pass: &Pass<'_>, list: u64, slot: u32) -> Result<Self, Refused> {
        let header = list + u64::from(slot) * HEADER_LEN;
        let mut words = [0; 16];
        pass.read(header, &mut words)?;
        let long =
            u64::from_le_bytes([words[8], words[9], words[10], words[11], words[12], words[13], words[14], words[15]]);
        let table = long & !0x7f;
        let mut bytes = [0; REGIONS as usize];
        pass.read(table, &mut bytes)?;
        let (mut fis, mut packet) = ([0; 64], [0; 12]);
        fis.copy_from_slice(&bytes[..64]);
        packet.copy_from_slice(&bytes[PACKET..PACKET + 12]);
        let regions = table.checked_add(REGIONS).ok_or(Refused::Bus)?;
        Ok(Self { header, fis, packet, regions, region_count: u16::from_le_bytes([words[2], words[3]]) })
    }

    /// Where its data goes.
    pub(super) fn scatter<'a>(&self, pass: Pass<'a>) -> Scatter<'a> {
        Scatter {
            pass,
            list: self.regions,
            left: self.region_count,
            batch: Vec::new(),
            room: None,
            moved: 0,
            marked: false,
        }
    }

    /// Tells the guest how many bytes were moved.
    pub(super) fn report(&self, pass: &Pass<'_>, moved: u64) -> Result<(), Refused> {
        let moved = u32::try_from(moved).unwrap_or(u32::MAX);
        pass.write(self.header + BYTES_MOVED, &moved.to_le_bytes())
    }
}

/// A region of guest memory (physical region descriptor).
#[derive(Clone, Copy, Debug)]
struct Region {
    addr: u64,
    len: usize,
    /// The guest wants an interrupt when it is full.
    marked: bool,
}

impl Region {
    fn parse(bytes: &[u8; REGION_LEN]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let addr = u64::from(word(4)) << 32 | u64::from(word(0) & !1);
        // One less than the bytes, which are an even number.
        let len = (word(12) as usize & 0x3f_ffff | 1) + 1;
        Self { addr, len, marked: word(12) >> 31 != 0 }
    }
}

/// Puts a command's data into its regions, one after the other. There are at most 65535, none of them empty.
pub(super) struct Scatter<'a> {
    pass: Pass<'a>,
    list: u64,
    left: u16,
    /// Regions that were fetched and not used yet, the next one last.
    batch: Vec<Region>,
    /// What is left of the one in use.
    room: Option<Region>,
    /// Bytes so far.
    pub(super) moved: u64,
    /// A marked region is full.
    pub(super) marked: bool,
}

impl Scatter<'_> {
    /// Puts `data` into the regions; whether there was room for all of it.
    pub(super) fn put(&mut self, mut data: &[u8]) -> Result<bool, Refused> {
        while !data.is_empty() {
            let Some(mut region) = self.next()? else { return Ok(false) };
            let (now, later) = data.split_at(region.len.min(data.len()));
            self.pass.write(region.addr, now)?;
            self.moved += now.len() as u64;
            data = later;
            region.addr = region.addr.saturating_add(now.len() as u64);
            region.len -= now.len();
            self.marked |= region.marked && region.len == 0;
            self.room = (region.len > 0).then_some(region);
        }
        Ok(true)
    }

    fn next(&mut self) -> Result<Option<Region>, Refused> {
        if let Some(region) = self.room.take() {
            return Ok(Some(region));
        }
        if self.batch.is_empty() && self.left > 0 {
            let count = usize::from(self.left).min(BATCH);
            let mut bytes = [0; BATCH * REGION_LEN];
            let bytes = &mut bytes[..count * REGION_LEN];
            self.pass.read(self.list, bytes)?;
            self.list = self.list.saturating_add(bytes.len() as u64);
            self.left -= count as u16;
            let (regions, _) = bytes.as_chunks();
            self.batch.extend(regions.iter().rev().map(Region::parse));
        }
        Ok(self.batch.pop())
    }
}
