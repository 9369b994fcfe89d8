//! What payloads find behind ports and outside RAM, as soc-vmm has it: the debug console, debug-exit, pc-testdev.

use ioreq_ring::{Completion, Direction, Kind, Request, Status};
use payloads::{TEST_MEMORY, ports};

use super::{Answer, Seen};

/// The devices, and what they were told. It is part of a machine's state: a copy goes where the VM goes.
#[derive(Clone, Debug)]
pub struct Board {
    /// What the guest wrote to the debug console.
    pub console: String,
    /// What it wrote to the debug-exit port.
    pub exit: Option<u8>,
    echo: [u8; 4],
    memory: Vec<u8>,
}

const MEMORY: usize = 0x1_0000;

impl Default for Board {
    fn default() -> Self {
        Self { console: String::new(), exit: None, echo: [0; 4], memory: vec![0; MEMORY] }
    }
}

impl Board {
    /// Serves a request. A write to the debug-exit port parks its vCPU.
    pub fn serve(&mut self, seen: &Seen) -> Answer {
        let Request { kind, direction, address, data, length, string, .. } = seen.request;
        let bytes = data.to_le_bytes();
        match (kind, direction) {
            (Kind::PIO, Direction::Write) if string => {
                for element in seen.string.chunks_exact(data as usize) {
                    self.write_port(address as u16, element);
                }
                Answer::Plain(Completion::ok(0))
            }
            (Kind::PIO, Direction::Read) if string => {
                let mut all = vec![0; length.into()];
                for element in all.chunks_exact_mut(data as usize) {
                    self.read_port(address as u16, element);
                }
                Answer::String(all)
            }
            (Kind::PIO, Direction::Write) => {
                self.write_port(address as u16, &bytes[..length.into()]);
                Answer::Plain(Completion { park: self.exit.is_some(), ..Completion::ok(0) })
            }
            (Kind::PIO, Direction::Read) => plain(length, |out| self.read_port(address as u16, out)),
            (Kind::MMIO, _) => match self.cells(address, length.into()) {
                Some(cells) if direction == Direction::Write => {
                    cells.copy_from_slice(&bytes[..length.into()]);
                    Answer::Plain(Completion::ok(0))
                }
                Some(cells) => plain(length, |out| out.copy_from_slice(cells)),
                None => Answer::Plain(Completion { status: Status::UNCLAIMED, ..Completion::ok(0) }),
            },
            _ => panic!("lane {}: {:?}\n{}", seen.lane, seen.request, self.console),
        }
    }

    fn write_port(&mut self, port: u16, value: &[u8]) {
        match port {
            ports::DEBUG_CONSOLE => self.console.extend(value.iter().copied().map(char::from)),
            ports::DEBUG_EXIT => self.exit = Some(value[0]),
            _ => {
                if let Some(cells) = self.echo(port, value.len()) {
                    cells.copy_from_slice(value);
                }
            }
        }
    }

    fn read_port(&mut self, port: u16, out: &mut [u8]) {
        match port {
            ports::DEBUG_CONSOLE => out.fill(ports::DEBUG_CONSOLE_READS),
            _ => match self.echo(port, out.len()) {
                Some(cells) => out.copy_from_slice(cells),
                None => out.fill(0xff),
            },
        }
    }

    fn echo(&mut self, port: u16, len: usize) -> Option<&mut [u8]> {
        let at = usize::from(port.checked_sub(ports::ECHO)?);
        self.echo.get_mut(at..at + len)
    }

    fn cells(&mut self, address: u64, len: usize) -> Option<&mut [u8]> {
        let at = usize::try_from(address.checked_sub(TEST_MEMORY)?).ok()?;
        self.memory.get_mut(at..at.checked_add(len)?)
    }
}

fn plain(length: u16, read: impl FnOnce(&mut [u8])) -> Answer {
    let mut bytes = [0; 8];
    read(&mut bytes[..length.into()]);
    Answer::Plain(Completion::ok(u64::from_le_bytes(bytes)))
}
