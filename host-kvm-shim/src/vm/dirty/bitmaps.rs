//! The log by KVM's bitmaps, one a memslot.

use api_channel::call::{Memslot, PAGE};
use kvm_ioctls::VmFd;

use super::harvest::{Harvest, keep_inside, ones, runs};
use super::{Found, Window};
use crate::error::Refusal;
use crate::kvm::{clear_dirty_log, get_dirty_log};
use crate::vm::slots::Slots;

/// Most pages of one request to clear.
const CHUNK: u64 = 1 << 18;

/// Keeps the dirty pages of a slot that goes.
pub(super) fn keep(vm: &VmFd, harvest: &mut Harvest, number: u32, slot: &Memslot) -> Result<(), Refusal> {
    let log = get(vm, number, slot.len / PAGE)?;
    harvest.add(slot.ram, slot.offset / PAGE, &log);
    Ok(())
}

/// KVM calls every page of a new slot dirty; what is dirty indeed was kept.
pub(super) fn begin(vm: &VmFd, number: u32, slot: &Memslot) -> Result<(), Refusal> {
    let pages = slot.len / PAGE;
    let ones = vec![u64::MAX; pages.min(CHUNK).div_ceil(64) as usize];
    (0..pages).step_by(CHUNK as usize).try_for_each(|first| {
        clear_dirty_log(vm, number, first, CHUNK.min(pages - first) as u32, &ones)
            .map_err(Refusal::nix("clear the dirty log"))
    })
}

/// Dirty pages of slots that are there and of those that are gone.
pub(super) fn fetch(vm: &VmFd, slots: &Slots, harvest: &mut Harvest, window: &Window) -> Result<Found, Refusal> {
    let mut bits = window.bits();
    harvest.pages(window).for_each(|page| window.mark(&mut bits, page));
    let mut logs = Vec::new();
    for (number, slot) in slots.of_ram(window.ram) {
        let (start, count) = (slot.offset / PAGE, slot.len / PAGE);
        if start >= window.end || start + count <= window.first {
            continue;
        }
        let log = get(vm, number, count)?;
        ones(&log).for_each(|page| window.mark(&mut bits, start + page));
        logs.push((number, start, count, log));
    }
    let found = runs(&bits, window.first, window.end);
    if window.clear {
        harvest.forget(window, &found);
        for (number, start, count, mut log) in logs {
            // What is told is cleared, and nothing else: bits beyond the last run told stay for the next fetch.
            let told = window.first.max(start) - start..found.next.min(start + count).max(start) - start;
            keep_inside(&mut log, told.start, told.end);
            clear_words(vm, number, count, &log)?;
        }
    }
    Ok(found)
}

fn get(vm: &VmFd, number: u32, pages: u64) -> Result<Vec<u64>, Refusal> {
    let mut log = vec![0; pages.div_ceil(64) as usize];
    get_dirty_log(vm, number, &mut log).map_err(Refusal::nix("read the dirty log"))?;
    Ok(log)
}

/// Clears the set bits of a slot's log of `count` pages, word ranges that hold any alone.
fn clear_words(vm: &VmFd, number: u32, count: u64, log: &[u64]) -> Result<(), Refusal> {
    let Some(from) = log.iter().position(|&w| w != 0) else { return Ok(()) };
    let to = log.iter().rposition(|&w| w != 0).map_or(log.len(), |last| last + 1);
    let first = from as u64 * 64;
    let pages = (to as u64 * 64).min(count) - first;
    clear_dirty_log(vm, number, first, pages as u32, &log[from..to]).map_err(Refusal::nix("clear the dirty log"))
}
