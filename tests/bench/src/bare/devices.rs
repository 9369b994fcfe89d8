//! What payloads find behind ports and outside RAM: the debug console, debug-exit, pc-testdev, the command port.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use payloads::{TEST_MEMORY, ports};

use super::Irqchip;
use super::ioapic::Ioapic;

const TEST_MEMORY_SIZE: usize = 0x1_0000;
const IOAPIC: u64 = 0xfec0_0000;
const ISA_INTERRUPTS: u16 = 16;

/// One exit of a vCPU, as KVM delivered it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Whose.
    pub vcpu: u8,
    /// What was touched.
    pub access: Access,
    /// Whether the guest wrote.
    pub write: bool,
    /// What was written or answered; a string's elements one after the other.
    pub data: Vec<u8>,
}

/// Where an exit went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A port, with the width of one element in bytes.
    Port(u16, u8),
    /// Guest-physical memory.
    Memory(u64),
}

/// Answers a payload's command port.
pub trait Driver: Send {
    /// The guest reads the command port: what is there to do?
    fn command(&mut self, _vcpu: u8, _vm: &VmFd) -> u32 {
        u32::MAX
    }

    /// The guest writes it.
    fn answer(&mut self, _vcpu: u8, _value: u32, _vm: &VmFd) {}
}

/// A driver that never wants anything.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Driver for Silent {}

/// What pc-testdev keeps: part of a machine's state.
#[derive(Debug, Clone)]
pub struct TestDevice {
    echo: [u8; 4],
    memory: Box<[u8]>,
}

impl Default for TestDevice {
    fn default() -> Self {
        TestDevice { echo: [0; 4], memory: vec![0; TEST_MEMORY_SIZE].into() }
    }
}

/// All devices, and what they saw.
pub(super) struct Devices {
    vm: Arc<VmFd>,
    irqchip: Irqchip,
    ioapic: Ioapic,
    pub(super) test_device: TestDevice,
    driver: Box<dyn Driver>,
    pub(super) console: Vec<u8>,
    pub(super) exit_code: Option<u8>,
    pub(super) events: Vec<Event>,
}

impl Devices {
    pub(super) fn new(vm: Arc<VmFd>, irqchip: Irqchip, test_device: TestDevice, driver: Box<dyn Driver>) -> Self {
        Devices {
            vm,
            irqchip,
            ioapic: Ioapic::default(),
            test_device,
            driver,
            console: Vec::new(),
            exit_code: None,
            events: Vec::new(),
        }
    }

    /// Serves a port; `data` holds whole elements of `width` bytes.
    pub(super) fn port(&mut self, vcpu: u8, port: u16, width: u8, write: bool, data: &mut [u8]) {
        for element in data.chunks_exact_mut(width.into()) {
            if write {
                self.write_port(vcpu, port, element);
            } else {
                self.read_port(vcpu, port, element);
            }
        }
        let logged = !matches!(port, ports::DEBUG_CONSOLE | ports::DEBUG_EXIT | ports::COMMAND);
        if logged {
            self.events.push(Event { vcpu, access: Access::Port(port, width), write, data: data.to_vec() });
        }
    }

    pub(super) fn memory(&mut self, vcpu: u8, address: u64, write: bool, data: &mut [u8]) {
        match address {
            IOAPIC..0xfec0_1000 => {
                if write {
                    self.ioapic.write(address - IOAPIC, data, &self.vm);
                } else {
                    self.ioapic.read(address - IOAPIC, data);
                }
            }
            _ => {
                self.test_memory(address, write, data);
                self.events.push(Event { vcpu, access: Access::Memory(address), write, data: data.to_vec() });
            }
        }
    }

    pub(super) fn end_of_interrupt(&mut self, vector: u8) {
        self.ioapic.end_of_interrupt(vector, &self.vm);
    }

    fn write_port(&mut self, vcpu: u8, port: u16, value: &[u8]) {
        match port {
            ports::DEBUG_CONSOLE => self.console.extend(value),
            ports::DEBUG_EXIT => self.exit_code = Some(value[0]),
            ports::COMMAND => {
                let value = value.try_into().map_or(u32::MAX, u32::from_le_bytes);
                self.driver.answer(vcpu, value, &self.vm);
            }
            _ if in_echo(port, value.len()) => {
                let at = usize::from(port - ports::ECHO);
                self.test_device.echo[at..at + value.len()].copy_from_slice(value);
            }
            _ => {
                if let Some(line) = port.checked_sub(ports::IRQ_LINES).filter(|&line| line < ISA_INTERRUPTS) {
                    self.interrupt_line(line as u8, value[0] != 0);
                }
            }
        }
    }

    fn read_port(&mut self, vcpu: u8, port: u16, value: &mut [u8]) {
        match port {
            ports::DEBUG_CONSOLE => value.fill(ports::DEBUG_CONSOLE_READS),
            ports::COMMAND => {
                let command = self.driver.command(vcpu, &self.vm).to_le_bytes();
                let length = value.len();
                value.copy_from_slice(&command[..length]);
            }
            _ if in_echo(port, value.len()) => {
                let at = usize::from(port - ports::ECHO);
                value.copy_from_slice(&self.test_device.echo[at..at + value.len()]);
            }
            _ => value.fill(0xff),
        }
    }

    fn test_memory(&mut self, address: u64, write: bool, data: &mut [u8]) {
        let cells = address
            .checked_sub(TEST_MEMORY)
            .and_then(|offset| self.test_device.memory.get_mut(offset as usize..offset as usize + data.len()));
        match cells {
            Some(cells) if write => cells.copy_from_slice(data),
            Some(cells) => data.copy_from_slice(cells),
            None if write => {}
            None => data.fill(0xff),
        }
    }

    fn interrupt_line(&mut self, line: u8, level: bool) {
        match self.irqchip {
            Irqchip::None => {}
            // A line that KVM can't raise shows in the payload, which waits for it.
            Irqchip::Full => drop(self.vm.set_irq_line(line.into(), level)),
            Irqchip::Split => self.ioapic.set_line(line, level, &self.vm),
        }
    }
}

fn in_echo(port: u16, length: usize) -> bool {
    (ports::ECHO..ports::ECHO + 4).contains(&port) && usize::from(port - ports::ECHO) + length <= 4
}
