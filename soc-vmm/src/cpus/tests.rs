use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::devices::acpi_bench::{access, acpi};

/// What a listener heard.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Deleted(String, String),
    Reported(Option<String>, u32, u32),
}

struct Listener(Mutex<Sender<Heard>>);

impl CpuListener for Listener {
    fn deleted(&self, Occupant { id, path }: Occupant) {
        self.0.lock().unwrap().send(Heard::Deleted(id, path)).unwrap();
    }

    fn reported(&self, id: Option<String>, report: CpuReport) {
        self.0.lock().unwrap().send(Heard::Reported(id, report.source, report.status)).unwrap();
    }
}

struct Rig {
    cpus: Cpus,
    registers: CpuHotplug,
    heard: Receiver<Heard>,
}

/// Two sockets of a core of two threads, of which `present` are there.
fn rig(present: u16) -> Rig {
    let (_, _, acpi) = acpi();
    let (sender, heard) = channel();
    let listener = Arc::new(Listener(Mutex::new(sender)));
    let (cpus, registers) = Cpus::new(Topology::new(2, 1, 2).unwrap(), present, acpi, listener);
    Rig { cpus, registers, heard }
}

impl Rig {
    /// The guest writes a register.
    fn write(&mut self, offset: u64, len: u8, data: u64) {
        assert_eq!(access(&mut self.registers, offset, len, Some(data)), 0);
    }

    /// The guest ejects a processor.
    fn eject(&mut self, cpu: u64) {
        self.write(0, 4, cpu);
        self.write(4, 1, 8);
    }

    /// What the control loop does with an order.
    fn admit(&self, place: Option<Place>, id: Option<&str>) -> Result<(usize, String), CpuError> {
        let (reply, _answer) = oneshot::channel();
        let order = Order { new: NewCpu { place, id: id.map(Into::into) }, reply };
        let admitted = self.cpus.admit(&order)?;
        self.cpus.insert(admitted.0, admitted.1.clone());
        Ok(admitted)
    }

    fn names(&self) -> Vec<Option<String>> {
        self.cpus.handle().slots().into_iter().map(|slot| slot.occupant.map(|cpu| cpu.id)).collect()
    }
}

fn place(socket: u32, core: u32, thread: u32) -> Option<Place> {
    Some(Place { socket, core, thread })
}

fn some(id: &str) -> Option<String> {
    Some(id.to_owned())
}

#[test]
fn each_processor_has_a_place_and_a_name_of_its_own() {
    let rig = rig(1);
    assert_eq!(rig.admit(place(1, 0, 0), Some("vcpu2")), Ok((2, "vcpu2".into())));
    for (place, id, words) in [
        (place(1, 0, 0), None, "at socket 1, core 0, thread 0 already"),
        (place(0, 1, 0), None, "no place for a processor at socket 0, core 1, thread 0"),
        (place(u32::MAX, u32::MAX, u32::MAX), None, "no place"),
        (None, Some("vcpu2"), "is a processor of this VM already"),
        (None, Some("cpu0"), "is a processor of this VM already"),
        (None, Some("2"), "an id is a letter"),
        (None, Some(""), "an id is a letter"),
    ] {
        let why = rig.admit(place, id).unwrap_err().to_string();
        assert!(why.contains(words), "{place:?} {id:?}: {why}");
    }
    assert_eq!((rig.admit(None, None), rig.admit(None, None)), (Ok((1, "cpu1".into())), Ok((3, "cpu3".into()))));
    assert_eq!(rig.admit(None, None), Err(CpuError::Full(4)));
    assert_eq!(rig.names(), ["cpu0", "cpu1", "vcpu2", "cpu3"].map(some));
    assert_eq!(rig.cpus.present(), [0, 1, 2, 3]);
    let paths: Vec<_> = rig.cpus.handle().slots().into_iter().filter_map(|slot| slot.occupant).collect();
    assert_eq!([&*paths[0].path, &*paths[2].path], ["/machine/unattached/device[0]", "/machine/peripheral/vcpu2"]);
}

#[test]
fn one_that_leaves_has_its_place_and_name_until_it_is_parked() {
    let mut rig = rig(3);
    let handle = rig.cpus.handle();
    assert_eq!(handle.remove("cpu0"), Err(CpuError::First("cpu0".into())));
    assert_eq!(handle.remove("cpu3"), Err(CpuError::NotFound("cpu3".into())));
    assert_eq!((handle.remove("cpu1"), handle.remove("cpu1")), (Ok(()), Ok(())));
    rig.eject(1);
    assert_eq!((rig.cpus.present(), rig.cpus.ejected(), handle.remove("cpu1")), (vec![0, 2], vec![1], Ok(())));
    assert!(handle.has("cpu1") && rig.heard.try_recv().is_err());
    assert!(matches!(rig.admit(place(0, 0, 1), None), Err(CpuError::Leaving(_))));
    rig.cpus.gone(1);
    let at = "/machine/unattached/device[1]".to_owned();
    assert_eq!(rig.heard.try_recv(), Ok(Heard::Deleted("cpu1".into(), at)));
    assert_eq!(rig.names(), [some("cpu0"), None, some("cpu2"), None]);
    assert_eq!(rig.admit(place(0, 0, 1), None), Ok((1, "cpu1".into())));
}

#[test]
fn what_a_guest_reports_is_told_with_the_processor_s_name() {
    let mut rig = rig(2);
    rig.write(0, 4, 1);
    let report = |rig: &mut Rig, source, status| {
        for (command, data) in [(1, source), (2, status)] {
            rig.write(5, 1, command);
            rig.write(8, 4, data);
        }
        rig.heard.try_recv().unwrap()
    };
    assert_eq!(report(&mut rig, 3, 0x81), Heard::Reported(some("cpu1"), 3, 0x81));
    rig.eject(1);
    rig.cpus.gone(1);
    assert!(matches!(rig.heard.try_recv(), Ok(Heard::Deleted(..))));
    assert_eq!(report(&mut rig, 0x103, 0), Heard::Reported(None, 0x103, 0));
}

#[tokio::test]
async fn the_control_loop_hears_of_orders_and_of_ejections() {
    let mut rig = rig(2);
    let handle = rig.cpus.handle();
    let asks = tokio::spawn(async move { handle.add(NewCpu::default()).await });
    let Work::Add(order) = rig.cpus.next().await else { panic!("an order") };
    let (index, id) = rig.cpus.admit(&order).unwrap();
    rig.cpus.insert(index, id.clone());
    order.answer(Ok(id));
    assert_eq!(asks.await.unwrap(), Ok("cpu2".into()));
    rig.eject(2);
    rig.eject(1);
    assert!(matches!(rig.cpus.next().await, Work::Park));
    assert_eq!(rig.cpus.ejected(), [1, 2]);
}

#[tokio::test]
async fn a_handle_keeps_no_machine() {
    let Rig { cpus, registers, .. } = rig(1);
    let handle = cpus.handle();
    drop((cpus, registers));
    assert_eq!(handle.add(NewCpu::default()).await, Err(CpuError::Ended));
    assert_eq!(handle.remove("cpu0"), Err(CpuError::Ended));
    assert!(handle.slots().is_empty() && !handle.has("cpu0"));
}
