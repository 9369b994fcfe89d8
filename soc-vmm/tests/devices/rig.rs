//! A machine without vCPUs: every device on its buses, and a hand on the clock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use soc_vmm::bus::{Access, Answer, Bus, Deferred, Device, LateAnswer, RequestId, Wake};
use soc_vmm::devices::{
    AcpiHandle, AcpiPm, BootDevice, Clock, Cmos, Com, DebugConsole, DebugExit, DelayPort, I8042, InputWriter,
    OutputReader, PcTestMemory, PcTestPorts, PmTimerWidth, Port92, Ranges, ResetControl, Rtc, SCI_GSI, Serial,
    input_pipe, output_pipe,
};
use soc_vmm::interrupt::{InterruptLine, LineSink};
use soc_vmm::power::{PowerEvent, PowerSink};

/// The emulated host's TSC, in kHz: whole ticks in a ns, so that what is reckoned from an earlier one is exact.
pub(crate) const TSC_KHZ: u64 = 2_000_000;
/// 2024-02-28T23:59:50Z, a Wednesday.
pub(crate) const START: Duration = Duration::from_secs(1_709_164_790);
/// Room in the queues of serial port and debug console.
pub(crate) const ROOM: usize = 40;

/// A clock that stands still until moved.
#[derive(Debug)]
pub(crate) struct HandClock {
    base: Instant,
    passed: Mutex<Duration>,
    lag: Mutex<Duration>,
    real: Mutex<Duration>,
}

impl HandClock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            base: Instant::now(),
            passed: Mutex::default(),
            lag: Mutex::default(),
            real: Mutex::new(START),
        })
    }

    pub(crate) fn pass(&self, time: Duration) {
        *self.passed.lock().unwrap() += time;
        *self.real.lock().unwrap() += time;
    }

    pub(crate) fn step_real(&self, to: Duration) {
        *self.real.lock().unwrap() = to;
    }

    /// The host's TSC is behind the SoC's clock by `lag`.
    pub(crate) fn lag_tsc(&self, lag: Duration) {
        *self.lag.lock().unwrap() = lag;
    }

    pub(crate) fn host_tsc(&self) -> u64 {
        let passed = (*self.passed.lock().unwrap() - *self.lag.lock().unwrap()).as_nanos();
        (passed * u128::from(TSC_KHZ) / 1_000_000) as u64
    }
}

impl Clock for HandClock {
    fn monotonic(&self) -> Instant {
        self.base + *self.passed.lock().unwrap()
    }

    fn realtime(&self) -> Duration {
        *self.real.lock().unwrap()
    }
}

/// Takes interrupt levels, and counts.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    levels: Mutex<BTreeMap<u32, bool>>,
    rises: AtomicUsize,
    said: AtomicUsize,
}

impl Lines {
    pub(crate) fn high(&self, gsi: u32) -> bool {
        self.levels.lock().unwrap().get(&gsi).copied().unwrap_or(false)
    }

    pub(crate) fn all_high(&self) -> Vec<u32> {
        self.levels.lock().unwrap().iter().filter(|(_, high)| **high).map(|(gsi, _)| *gsi).collect()
    }

    /// How often a level was said, all together.
    pub(crate) fn said(&self) -> usize {
        self.said.load(Ordering::Relaxed)
    }

    /// Loses every level, as an irqchip that was restored from elsewhere.
    pub(crate) fn forget(&self) {
        self.levels.lock().unwrap().clear();
    }

    /// How often a line rose, all together.
    pub(crate) fn rises(&self) -> usize {
        self.rises.load(Ordering::Relaxed)
    }
}

impl LineSink for Lines {
    fn set_level(&self, gsi: u32, high: bool) {
        self.said.fetch_add(1, Ordering::Relaxed);
        let old = self.levels.lock().unwrap().insert(gsi, high).unwrap_or(false);
        if high && !old {
            self.rises.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Power(Mutex<Vec<PowerEvent>>);

impl Power {
    pub(crate) fn take(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl PowerSink for Power {
    fn power(&self, event: PowerEvent) {
        self.0.lock().unwrap().push(event);
    }
}

#[derive(Debug, Default)]
pub(crate) struct Wakes(AtomicUsize);

impl Wakes {
    pub(crate) fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl Wake for Wakes {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

pub(crate) struct Rig {
    pub(crate) ports: Bus,
    pub(crate) memory: Bus,
    pub(crate) clock: Arc<HandClock>,
    pub(crate) lines: Arc<Lines>,
    pub(crate) power: Arc<Power>,
    pub(crate) wakes: Arc<Wakes>,
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) serial_in: InputWriter,
    pub(crate) serial_out: OutputReader,
    pub(crate) rtc: Arc<Mutex<Rtc>>,
    pub(crate) i8042: Arc<Mutex<I8042>>,
    pub(crate) acpi: Arc<Mutex<AcpiPm>>,
    pub(crate) acpi_handle: AcpiHandle,
    pub(crate) port92: Arc<Mutex<Port92>>,
    pub(crate) reset_control: Arc<Mutex<ResetControl>>,
    pub(crate) debug_console: Arc<Mutex<DebugConsole>>,
    pub(crate) debug_out: OutputReader,
    pub(crate) test_ports: Arc<Mutex<PcTestPorts>>,
    pub(crate) test_memory: Arc<Mutex<PcTestMemory>>,
    /// Answers that were not `Done`.
    pub(crate) unclaimed: usize,
}

pub(crate) const CMOS: Cmos = Cmos {
    ram_below_4g: 512 << 20,
    ram_above_4g: 0,
    cpus: 2,
    boot: [Some(BootDevice::CdRom), Some(BootDevice::Disk), None],
};

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(HandClock::new(), PmTimerWidth::Bits24)
    }

    pub(crate) fn with(clock: Arc<HandClock>, width: PmTimerWidth) -> Self {
        let lines = Arc::new(Lines::default());
        let sink: Arc<dyn LineSink> = lines.clone();
        let line = |gsi| InterruptLine::new(gsi, sink.clone());
        let power = Arc::new(Power::default());
        let wakes = Arc::new(Wakes::default());
        let (output, serial_out) = output_pipe(ROOM, wakes.clone());
        let (serial_in, input) = input_pipe(ROOM, wakes.clone());
        let (debug_output, debug_out) = output_pipe(ROOM, wakes.clone());
        let (acpi, acpi_handle) =
            AcpiPm::new(TSC_KHZ, width, clock.clone(), line(SCI_GSI), power.clone(), wakes.clone());
        let acpi = acpi.with_sleep();
        let mut rig = Self {
            ports: Bus::default(),
            memory: Bus::default(),
            serial: shared(Serial::new(output, input, line(Com::Com1.gsi()))),
            serial_in,
            serial_out,
            rtc: shared(Rtc::new(&CMOS, clock.clone(), line(Rtc::GSI))),
            i8042: shared(I8042::new(line(I8042::KEYBOARD_GSI), line(I8042::AUX_GSI), power.clone())),
            acpi: shared(acpi),
            acpi_handle,
            port92: shared(Port92::new(power.clone())),
            reset_control: shared(ResetControl::new(power.clone())),
            debug_console: shared(DebugConsole::new(debug_output)),
            debug_out,
            test_ports: shared(PcTestPorts::new(&sink)),
            test_memory: shared(PcTestMemory::new()),
            clock,
            lines,
            power,
            wakes,
            unclaimed: 0,
        };
        rig.insert(Com::Com1.ranges(), rig.serial.clone());
        rig.insert(Rtc::RANGES, rig.rtc.clone());
        rig.insert(I8042::RANGES, rig.i8042.clone());
        rig.insert(AcpiPm::RANGES, rig.acpi.clone());
        rig.insert(Port92::RANGES, rig.port92.clone());
        rig.insert(ResetControl::RANGES, rig.reset_control.clone());
        rig.insert(DebugConsole::RANGES, rig.debug_console.clone());
        rig.insert(DebugExit::RANGES, DebugExit::new(rig.power.clone()));
        rig.insert(DelayPort::RANGES, DelayPort);
        rig.insert(PcTestPorts::RANGES, rig.test_ports.clone());
        rig.insert(PcTestMemory::RANGES, rig.test_memory.clone());
        rig
    }

    fn insert(&mut self, ranges: Ranges, device: impl Device + 'static) {
        let (bus, claims) = match ranges.memory {
            [] => (&mut self.ports, ranges.ports),
            memory => (&mut self.memory, memory),
        };
        bus.insert(claims, Box::new(device)).unwrap();
    }

    /// Writes `len` bytes at a port.
    pub(crate) fn out(&mut self, port: u64, len: u8, data: u64) {
        self.access(false, port, len, Some(data));
    }

    /// Reads `len` bytes at a port.
    pub(crate) fn inp(&mut self, port: u64, len: u8) -> u64 {
        self.access(false, port, len, None)
    }

    /// Writes one byte.
    pub(crate) fn outb(&mut self, port: u64, byte: u8) {
        self.out(port, 1, byte.into());
    }

    /// Reads one byte.
    pub(crate) fn inb(&mut self, port: u64) -> u8 {
        self.inp(port, 1) as u8
    }

    /// One access, answered as the shim would: unclaimed reads give all ones, and the value has `len` bytes.
    pub(crate) fn access(&mut self, memory: bool, at: u64, len: u8, data: Option<u64>) -> u64 {
        let (late, answers) = mpsc::channel::<LateAnswer>();
        let wake: Arc<dyn Wake> = self.wakes.clone();
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        let access = Access { vcpu: 0, host_tsc: self.clock.host_tsc(), len };
        let bus = if memory { &mut self.memory } else { &mut self.ports };
        let answer = match data {
            Some(data) => bus.write(at, data, &access, reply),
            None => bus.read(at, &access, reply),
        };
        assert!(answers.try_recv().is_err(), "none of these devices defers");
        let value = match answer {
            Answer::Done(value) => value,
            Answer::Unclaimed => {
                self.unclaimed += 1;
                u64::MAX
            }
            answer => panic!("{answer:?}"),
        };
        value & u64::MAX >> (64 - 8 * u32::from(len.clamp(1, 8)))
    }

    /// What the thread that serves IOREQs does between accesses.
    pub(crate) fn settle(&mut self) {
        let due =
            [&self.ports, &self.memory].iter().filter_map(|bus| bus.deadline()).any(|at| at <= self.clock.monotonic());
        if self.wakes.take() > 0 || due {
            self.ports.poll();
            self.memory.poll();
        }
    }

    /// Lets `time` pass, polling at each deadline.
    pub(crate) fn pass(&mut self, time: Duration) {
        let end = self.clock.monotonic() + time;
        self.settle();
        while let Some(at) = self.ports.deadline().filter(|at| *at <= end) {
            self.clock.pass(at - self.clock.monotonic());
            self.settle();
        }
        self.clock.pass(end - self.clock.monotonic());
        self.settle();
    }

    /// Everything sent by the serial port since the last time.
    pub(crate) fn sent(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.serial_out.try_read(&mut bytes);
        bytes
    }
}

fn shared<D>(device: D) -> Arc<Mutex<D>> {
    Arc::new(Mutex::new(device))
}
