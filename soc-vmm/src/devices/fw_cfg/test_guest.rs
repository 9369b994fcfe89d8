//! A guest that reads fw_cfg, for tests.

use std::sync::{Arc, Mutex, mpsc};

use super::{Builder, FwCfg, key};
use crate::bus::{Access, Answer, Deferred, Device, RequestId, Wake};
use crate::memory::{GuestMemory, MemoryError};

/// RAM from address 0 on.
pub(crate) struct Ram(Mutex<Vec<u8>>);

impl Ram {
    pub(crate) fn new(len: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0xa5; len])))
    }

    fn range(&self, addr: u64, len: usize) -> Result<std::ops::Range<usize>, MemoryError> {
        let end = addr.checked_add(len as u64).filter(|end| *end <= self.0.lock().unwrap().len() as u64);
        let end = end.ok_or(MemoryError::NotRam { addr, len: len as u64 })?;
        Ok(addr as usize..end as usize)
    }

    pub(crate) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let range = self.range(addr, len).unwrap();
        self.0.lock().unwrap()[range].to_vec()
    }
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let range = self.range(addr, data.len())?;
        data.copy_from_slice(&self.0.lock().unwrap()[range]);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let range = self.range(addr, data.len())?;
        self.0.lock().unwrap()[range].copy_from_slice(data);
        Ok(())
    }
}

#[derive(Debug)]
struct Asleep;

impl Wake for Asleep {
    fn wake(&self) {}
}

pub(crate) struct Guest {
    pub(crate) device: FwCfg,
    pub(crate) ram: Arc<Ram>,
}

impl Guest {
    pub(crate) fn new(fill: impl FnOnce(Builder) -> Builder) -> Self {
        let ram = Ram::new(0x10_0000);
        let builder = FwCfg::builder(ram.clone()).memory(1 << 30, &[]).cpus(|| 2, 2);
        Self { device: fill(builder).build().unwrap(), ram }
    }

    /// An access at `offset`; what it gives.
    pub(crate) fn access(&mut self, offset: u64, len: u8, data: Option<u64>) -> u64 {
        let (late, _answers) = mpsc::channel();
        let wake: Arc<dyn Wake> = Arc::new(Asleep);
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let answer = match data {
            Some(data) => self.device.write(&access, offset, data, reply),
            None => self.device.read(&access, offset, reply),
        };
        let Answer::Done(value) = answer else { panic!("{answer:?}") };
        value & (u64::MAX >> (64 - 8 * u32::from(len)))
    }

    pub(crate) fn select(&mut self, key: u16) {
        self.access(0, 2, Some(key.into()));
    }

    pub(crate) fn read(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.access(1, 1, None) as u8).collect()
    }

    /// Runs a descriptor at 0x100 and gives its control word afterwards.
    pub(crate) fn dma(&mut self, control: u32, len: u32, address: u64) -> u32 {
        let descriptor = [&control.to_be_bytes()[..], &len.to_be_bytes(), &address.to_be_bytes()].concat();
        self.ram.write(0x100, &descriptor).unwrap();
        self.access(2, 4, Some(0));
        self.access(6, 4, Some(0x100u32.swap_bytes().into()));
        u32::from_be_bytes(self.ram.bytes(0x100, 4).try_into().unwrap())
    }

    /// The directory: name, key, length.
    pub(crate) fn files(&mut self) -> Vec<(String, u16, u32)> {
        self.select(key::DIRECTORY);
        let count = u32::from_be_bytes(self.read(4).try_into().unwrap());
        let entry = |bytes: &[u8]| {
            let name = bytes[8..].iter().take_while(|byte| **byte != 0).copied().collect();
            let len = u32::from_be_bytes(bytes[..4].try_into().unwrap());
            (String::from_utf8(name).unwrap(), u16::from_be_bytes([bytes[4], bytes[5]]), len)
        };
        (0..count).map(|_| self.read(64)).map(|bytes| entry(&bytes)).collect()
    }

    pub(crate) fn file(&mut self, name: &str) -> (u16, u32) {
        let files = self.files();
        files.into_iter().find(|file| file.0 == name).map(|(_, key, len)| (key, len)).unwrap()
    }
}
