//! A CPU model, a topology and NUMA nodes as an unmodified Linux kernel sees them, on real KVM in an emulated server.

use std::time::Duration;

use integration::machines::but_for_the_emulator;
use integration::test_name;
use testbed::bed::BedConfig;
use testbed::guest::UP_MARK;
use testbed::protocol::Status;
use testbed::vmm::{VmConfig, Vmm};

/// How long a guest may take to come up. Seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// What is typed, and what the guest then says: 8 vCPUs, 2 sockets of 2 cores of 2 threads, a node each.
const ANSWERS: [(&str, &str); 7] = [
    ("grep -m1 'model name' /proc/cpuinfo | cut -d: -f2", " Virtual CPU (x86-64-v2)"),
    ("grep -c ' sse4_2 ' /proc/cpuinfo; grep -c ' avx ' /proc/cpuinfo", "8\r\n0"),
    ("cd /sys/devices/system/cpu; echo $(cat cpu?/topology/physical_package_id)", "0 0 0 0 1 1 1 1"),
    ("echo $(cat cpu?/topology/thread_siblings_list)", "0-1 0-1 2-3 2-3 4-5 4-5 6-7 6-7"),
    ("cd ../node; echo $(cat online node?/cpulist)", "0-1 0-3 4-7"),
    ("awk '/MemTotal/ { print ($4 > 200000) }' node1/meminfo", "1"),
    ("cat ../clocksource/clocksource0/current_clocksource", "kvm-clock"),
];

#[test]
fn linux_finds_its_vcpus_model_and_nodes() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    but_for_the_emulator(boots);
}

fn boots() {
    let mut bed = BedConfig::new("machine-placement", 1);
    // Where vCPUs take turns on a processor, QEMU's TCG shuts the server down now and then (docs/testbed.md).
    bed.server.basics.cpus = 8;
    let bed = bed.start().unwrap();
    // Two are in the other tests of machines.
    for cpus in [1, 4] {
        let mut vmm = Vmm::run(&bed, &VmConfig { cpus, ..VmConfig::new("linux", 0) }).unwrap();
        vmm.expect(&format!("{UP_MARK}{cpus}"), BOOT_LIMIT).unwrap();
        ends(vmm);
    }
    let args = [
        ["--cpu", "x86-64-v2"],
        ["--cpus", "8,sockets=2,threads=2"],
        ["--numa", "cpus=0-3,memory=256M,host=0"],
        ["--numa", "cpus=4-7,memory=256M,host=0,pin=on"],
    ];
    let vm = VmConfig { args: args.concat().into_iter().map(str::to_owned).collect(), ..VmConfig::new("linux", 0) };
    let mut vmm = Vmm::run(&bed, &vm).unwrap();
    vmm.expect(&format!("{UP_MARK}8"), BOOT_LIMIT).unwrap();
    for (typed, answer) in ANSWERS {
        vmm.expect("# ", ANSWER_LIMIT).unwrap();
        vmm.type_text(&format!("{typed}\n")).unwrap();
        vmm.expect(&format!("\n{answer}\r\n"), ANSWER_LIMIT).unwrap_or_else(|e| panic!("{typed}: {e}"));
    }
    ends(vmm);
    bed.server.power_off(ANSWER_LIMIT).unwrap();
}

/// Switches the guest off from its prompt.
fn ends(mut vmm: Vmm<'_>) {
    vmm.expect("# ", ANSWER_LIMIT).unwrap();
    vmm.type_text("poweroff -f\n").unwrap();
    assert_eq!((vmm.wait_for_exit(ANSWER_LIMIT).unwrap(), vmm.complaints().as_str()), (Status::Code(0), ""));
}
