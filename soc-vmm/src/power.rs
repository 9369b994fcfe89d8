//! What a guest can ask of its machine as a whole.

/// A request of the guest to its machine, made by a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Reset the machine (0xcf9, i8042, ACPI reset register, triple fault).
    Reset,
    /// Power off (ACPI S5).
    PowerOff,
    /// Suspend to RAM (ACPI S3).
    Suspend,
    /// What the guest sleeps for has come: go on. No vCPU runs.
    WakeUp,
    /// isa-debug-exit: ends soc-vmm with the status `(value << 1) | 1`.
    DebugExit(u8),
}

/// Where devices report [`PowerEvent`]s. Called on the thread that serves IOREQs: the vCPU that asked does not run on.
pub trait PowerSink: Send + Sync {
    /// Reports an event.
    fn power(&self, event: PowerEvent);
}

/// What a guest tells of its own end (pvpanic).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashEvent {
    /// The kernel panicked, and does nothing more.
    Panicked,
    /// The kernel panicked, and another one that was loaded for that case takes over.
    CrashLoaded,
}

/// Where [`CrashEvent`]s go. Called on the thread that serves IOREQs; the vCPU runs on. Each event comes at most once between two
/// resets.
pub trait CrashSink: Send + Sync {
    /// Reports an event.
    fn crashed(&self, event: CrashEvent);
}
