//! State of the VM's in-kernel chips and its clock: KVM's structures ⇄ the wire's records.

use api_channel::call::Irqchip;
use api_channel::codec::Malformed;
use api_channel::state::{Clock, IoApic, Pic, Pit, PitChannel, Records, Type, records};
use kvm_bindings::*;
use kvm_ioctls::VmFd;

use crate::error::Refusal;
use crate::vcpu::skip_or_refuse;

/// Reads the records of `groups`. All vCPUs are out of the guest.
pub(crate) fn read(vm: &VmFd, irqchip: Irqchip, groups: u64) -> Result<Vec<u8>, Refusal> {
    let wanted = |kind: Type| groups & kind.group() != 0;
    let full = irqchip == Irqchip::Full;
    let mut list = Records::default();
    if full && wanted(Type::PIC) {
        let chips = [chip(vm, KVM_IRQCHIP_PIC_MASTER)?, chip(vm, KVM_IRQCHIP_PIC_SLAVE)?];
        list = list.put(Type::PIC, &Pic { chips: chips.map(|c| pic_bytes(&c)) });
    }
    if full && wanted(Type::IOAPIC) {
        list = list.put(Type::IOAPIC, &from_ioapic(&chip(vm, KVM_IRQCHIP_IOAPIC)?));
    }
    if full && wanted(Type::PIT) {
        let pit = vm.get_pit2().map_err(Refusal::kvm("read the PIT"))?;
        list = list.put(Type::PIT, &Pit { channels: pit.channels.map(|c| from_channel(&c)), flags: pit.flags.into() });
    }
    if wanted(Type::CLOCK) {
        let clock = vm.get_clock().map_err(Refusal::kvm("read the clock"))?;
        let valid = |flag: u32, value: u64| if clock.flags & flag != 0 { value } else { 0 };
        let record = Clock {
            kvmclock: clock.clock,
            realtime: valid(KVM_CLOCK_REALTIME, clock.realtime),
            host_tsc: valid(KVM_CLOCK_HOST_TSC, clock.host_tsc),
            flags: clock.flags.into(),
        };
        list = list.put(Type::CLOCK, &record);
    }
    Ok(list.done())
}

/// Sets records, in their order.
pub(crate) fn write(vm: &VmFd, irqchip: Irqchip, list: &[u8]) -> Result<(), Refusal> {
    let full = irqchip == Irqchip::Full;
    for record in records(list)? {
        match record.kind {
            Type::PIC if full => {
                let pic: Pic = record.get()?;
                for (id, bytes) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].into_iter().zip(pic.chips) {
                    let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
                    chip.chip.pic = pic_state(bytes);
                    vm.set_irqchip(&chip).map_err(Refusal::kvm("set the PIC"))?;
                }
            }
            Type::IOAPIC if full => {
                let ioapic: IoApic = record.get()?;
                if ioapic.reserved != 0 {
                    return Err(Malformed.into());
                }
                let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
                chip.chip.ioapic = to_ioapic(&ioapic);
                vm.set_irqchip(&chip).map_err(Refusal::kvm("set the IOAPIC"))?;
            }
            Type::PIT if full => {
                let pit: Pit = record.get()?;
                let flags = u32::try_from(pit.flags).map_err(|_| Malformed)?;
                let state =
                    kvm_pit_state2 { channels: pit.channels.map(|c| to_channel(&c)), flags, ..Default::default() };
                vm.set_pit2(&state).map_err(Refusal::kvm("set the PIT"))?;
            }
            Type::CLOCK => {
                let clock: Clock = record.get()?;
                // With the real time, KVM moves its clock on by what has passed since.
                let flags = u32::try_from(clock.flags).map_err(|_| Malformed)? & KVM_CLOCK_REALTIME;
                let data =
                    kvm_clock_data { clock: clock.kvmclock, flags, realtime: clock.realtime, ..Default::default() };
                vm.set_clock(&data).map_err(Refusal::kvm("set the clock"))?;
            }
            kind => skip_or_refuse(&record, kind)?,
        }
    }
    Ok(())
}

fn chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, Refusal> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(Refusal::kvm("read an interrupt controller"))?;
    Ok(chip)
}

/// `unsafe`: the chip's state is a union, whose arm its id names; all arms are plain numbers.
#[allow(unsafe_code)]
fn pic_bytes(chip: &kvm_irqchip) -> [u8; 16] {
    // SAFETY: every bit pattern is a kvm_pic_state, and KVM filled in this arm: the id is a PIC's.
    let p = unsafe { chip.chip.pic };
    [
        p.last_irr,
        p.irr,
        p.imr,
        p.isr,
        p.priority_add,
        p.irq_base,
        p.read_reg_select,
        p.poll,
        p.special_mask,
        p.init_state,
        p.auto_eoi,
        p.rotate_on_auto_eoi,
        p.special_fully_nested_mode,
        p.init4,
        p.elcr,
        p.elcr_mask,
    ]
}

fn pic_state(bytes: [u8; 16]) -> kvm_pic_state {
    let [last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state, rest @ ..] =
        bytes;
    let [auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask] = rest;
    kvm_pic_state {
        last_irr,
        irr,
        imr,
        isr,
        priority_add,
        irq_base,
        read_reg_select,
        poll,
        special_mask,
        init_state,
        auto_eoi,
        rotate_on_auto_eoi,
        special_fully_nested_mode,
        init4,
        elcr,
        elcr_mask,
    }
}

/// `unsafe`: as [`pic_bytes`].
#[allow(unsafe_code)]
fn from_ioapic(chip: &kvm_irqchip) -> IoApic {
    // SAFETY: every bit pattern is a kvm_ioapic_state, and KVM filled in this arm: the id is the IOAPIC's.
    let io = unsafe { chip.chip.ioapic };
    // SAFETY: both arms of an entry are its 64 bits.
    let redirection = io.redirtbl.map(|entry| unsafe { entry.bits });
    IoApic { base: io.base_address, select: io.ioregsel, id: io.id, irr: io.irr, reserved: 0, redirection }
}

fn to_ioapic(io: &IoApic) -> kvm_ioapic_state {
    kvm_ioapic_state {
        base_address: io.base,
        ioregsel: io.select,
        id: io.id,
        irr: io.irr,
        pad: 0,
        redirtbl: io.redirection.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
    }
}

fn from_channel(c: &kvm_pit_channel_state) -> PitChannel {
    PitChannel {
        count: c.count,
        latched_count: c.latched_count,
        bytes: [
            c.count_latched,
            c.status_latched,
            c.status,
            c.read_state,
            c.write_state,
            c.write_latch,
            c.rw_mode,
            c.mode,
            c.bcd,
            c.gate,
        ],
        load_time: c.count_load_time,
    }
}

fn to_channel(c: &PitChannel) -> kvm_pit_channel_state {
    let [count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate] =
        c.bytes;
    kvm_pit_channel_state {
        count: c.count,
        latched_count: c.latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time: c.load_time,
    }
}
