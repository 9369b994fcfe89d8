//! What a guest can ask of its machine as a whole.

/// A request of the guest to its machine, made by a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Reset the machine (0xcf9, i8042, ACPI reset register, triple fault).
    Reset,
    /// Power off (ACPI S5).
    PowerOff,
    /// isa-debug-exit: ends soc-vmm with the status `(value << 1) | 1`.
    DebugExit(u8),
}

/// Where devices report [`PowerEvent`]s. Called on the thread that serves IOREQs: the vCPU that asked does not run on.
pub trait PowerSink: Send + Sync {
    /// Reports an event.
    fn power(&self, event: PowerEvent);
}
