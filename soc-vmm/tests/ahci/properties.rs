//! Whatever a guest does, the controller goes on.

use proptest::prelude::*;
use soc_vmm::ahci::CdDrive;
use soc_vmm::pci::PciFunction;

use crate::rig::*;

#[derive(Clone, Debug)]
enum Step {
    Access { region: usize, offset: u64, len: u8, data: Option<u64> },
    Register { port: usize, register: u64, value: u32 },
    Config { offset: u16, len: u8, value: u32 },
    Fill { addr: u64, bytes: Vec<u8> },
    Packet { slot: u32, packet: Vec<u8>, features: u8, regions: Vec<(u64, u32)> },
    Ata { slot: u32, fis: Vec<u8> },
    Eject(bool),
    Close,
    Reset,
    Start,
}

fn step() -> impl Strategy<Value = Step> {
    let addr = || prop_oneof![0..RAM as u64, any::<u64>()];
    let region = (addr(), prop_oneof![1u32..8192, 1u32..=1 << 22]);
    let regions = proptest::collection::vec(region, 0..5);
    let code = proptest::sample::select(vec![
        0u8, 3, 0x12, 0x1b, 0x1e, 0x25, 0x28, 0x2b, 0x43, 0x46, 0x4a, 0x51, 0x5a, 0xa8, 0xad, 0xbb, 0xbd, 0xbe,
    ]);
    let packet = (prop_oneof![code, any::<u8>()], proptest::collection::vec(prop_oneof![0u8..4, any::<u8>()], 11))
        .prop_map(|(code, rest)| [vec![code], rest].concat());
    prop_oneof![
        2 => (4usize..=5, 0u64..4096, 1u8..=8, any::<Option<u64>>())
            .prop_map(|(region, offset, len, data)| Step::Access { region, offset, len, data }),
        4 => (0usize..6, 0u64..32, any::<u32>())
            .prop_map(|(port, register, value)| Step::Register { port, register: register * 4, value }),
        1 => (0u16..0x60, any::<u32>()).prop_map(|(at, value)| Step::Config { offset: at & !3, len: 4, value }),
        2 => (addr(), proptest::collection::vec(any::<u8>(), 0..64)).prop_map(|(addr, bytes)| Step::Fill { addr, bytes }),
        8 => (0u32..32, packet, 0u8..2, regions)
            .prop_map(|(slot, packet, features, regions)| Step::Packet { slot, packet, features, regions }),
        2 => (0u32..32, proptest::collection::vec(any::<u8>(), 20)).prop_map(|(slot, fis)| Step::Ata { slot, fis }),
        1 => any::<bool>().prop_map(Step::Eject),
        1 => Just(Step::Close),
        1 => Just(Step::Reset),
        3 => Just(Step::Start),
    ]
}

fn take(rig: &mut Rig, step: Step) {
    match step {
        Step::Access { region, offset, len, data } => {
            rig.access(region, offset, len, data);
        }
        Step::Register { port: index, register, value } => rig.set(port(index, register), value),
        Step::Config { offset, len, value } => rig.ahci.write_config(offset, len, value),
        Step::Fill { addr, bytes } => {
            let _ = soc_vmm::memory::GuestMemory::write(&*rig.memory, addr, &bytes);
        }
        Step::Packet { slot, packet, features, regions } => {
            rig.prepare(slot, &[0x27, 0x80, 0xa0, features], &packet, &regions);
            rig.set(port(0, CI), 1 << slot);
        }
        Step::Ata { slot, mut fis } => {
            fis[0] = 0x27;
            rig.prepare(slot, &fis, &[], &[(DATA, 512)]);
            rig.set(port(0, CI), 1 << slot);
        }
        Step::Eject(force) => drop(rig.drive().eject(force)),
        Step::Close => rig.drive().close_tray(),
        Step::Reset => rig.ahci.reset(),
        Step::Start => rig.start(),
    }
    rig.ahci.poll();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn a_guest_that_does_anything_has_a_controller_afterwards(steps in proptest::collection::vec(step(), 0..60)) {
        let dir = tempfile::tempdir().unwrap();
        let mut rig = Rig::new(CdDrive { medium: Some(disc(dir.path(), 200)), ..CdDrive::default() });
        for step in steps {
            take(&mut rig, step);
        }
        // A machine reset, and all is well.
        rig.ahci.reset();
        prop_assert!(!rig.line.is_high());
        rig.start();
        let _ = rig.drive().change(disc(dir.path(), 3), true);
        prop_assert_eq!(rig.sense(&[0]), [6, 0x28, 0]);
        prop_assert_eq!(rig.data(&[0x28, 0, 0, 0, 0, 2, 0, 0, 1, 0]), vec![2; 2048]);
    }
}
