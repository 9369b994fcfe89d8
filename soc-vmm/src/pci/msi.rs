//! MSI (PCI Express Base §7.7.1) of functions that have one interrupt.

use super::config::ConfigSpace;
use crate::interrupt::{Message, MessageRoute, MessageSink};

/// Capability: MSI.
const CAP_MSI: u8 = 0x05;
/// Message control: enable, and 64-bit addresses.
const ENABLE: u16 = 1 << 0;
const WIDE: u16 = 1 << 7;

/// A function's one message; its registers are those of the configuration space.
pub struct Msi {
    capability: u16,
    route: Box<dyn MessageRoute>,
    routed: Option<Message>,
}

impl Msi {
    /// Adds the capability to `config`.
    pub fn new(config: &mut ConfigSpace, sink: &dyn MessageSink) -> Self {
        let mut body = WIDE.to_le_bytes().to_vec();
        body.extend([0; 10]);
        let mut writable = ENABLE.to_le_bytes().to_vec();
        writable.extend([0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        let capability = config.add_capability(CAP_MSI, &body, &writable);
        Self { capability, route: sink.route(), routed: None }
    }

    /// Looks at the capability again, after a write to configuration space or a reset.
    pub fn configure(&mut self, config: &ConfigSpace) {
        let at = self.capability;
        let address = u64::from(config.read(at + 4, 4)) | u64::from(config.read(at + 8, 4)) << 32;
        let message = Message { address, data: config.read(at + 12, 2) };
        let wanted = (config.u16(at + 2) & ENABLE != 0).then_some(message);
        if self.routed != wanted {
            self.route.set(wanted);
            self.routed = wanted;
        }
    }

    /// Whether the guest uses MSI: INTx is not used then.
    pub fn enabled(&self) -> bool {
        self.routed.is_some()
    }

    /// Raises the message, if there is one.
    pub fn raise(&self) {
        self.route.raise();
    }
}

impl std::fmt::Debug for Msi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msi").field("routed", &self.routed).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Identity;
    use super::super::test_sink::TestSink;
    use super::*;

    #[test]
    fn the_message_is_the_one_in_the_registers() {
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
        let mut config = ConfigSpace::endpoint(&identity);
        let sink = TestSink::default();
        let mut msi = Msi::new(&mut config, &sink);
        assert_eq!(config.read(0x40, 4), 0x80_0005);
        config.write(0x44, 4, 0xfee0_2003);
        config.write(0x4c, 4, 0x1_0031);
        config.write(0x42, 2, 0x71);
        msi.configure(&config);
        assert!(msi.enabled());
        msi.raise();
        assert_eq!(sink.raised(), [Message { address: 0xfee0_2000, data: 0x31 }]);
        config.reset();
        msi.configure(&config);
        msi.raise();
        assert!(!msi.enabled() && sink.raised().len() == 1);
    }
}
