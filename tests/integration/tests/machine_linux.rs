//! An unmodified Linux kernel as the guest of an emulated server: boots, answers, reboots, is reset, switches itself off.

use std::time::{Duration, Instant};

use integration::machines::{Counters, but_for_the_emulator, shim_is_small};
use integration::test_name;
use testbed::bed::{BedConfig, SHIM, SOC_VMM};
use testbed::card::SOC_VM;
use testbed::guest::UP_MARK;
use testbed::machine::Machine;
use testbed::protocol::Status;
use testbed::vmm::{VmConfig, Vmm};

/// How long a guest may take to come up. Seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// Of a soc-vmm.
const CONFIGURATION: &str = "/etc/outboard/soc-vmm.toml";
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// It is told of Hyper-V's interfaces, too; it finds KVM behind them, and prefers it.
#[test]
fn linux_lives_where_soc_vmm_runs_on_this_machine() {
    but_for_the_emulator(|| linux_lives(&BedConfig::new("machine-linux", 1), &["--cpu", "host,hv-passthrough"]));
}

/// There the function comes by a pool, and soc-vmm is confined.
#[test]
fn linux_lives_where_soc_vmm_runs_on_an_arm_soc() {
    let mut config = BedConfig::new("machine-linux-arm", 1).with_arm_soc();
    // A place for what can be said once the function has an address.
    let file = tempfile::NamedTempFile::new().unwrap();
    let files = config.soc.as_mut().map(|soc| &mut soc.basics.files).expect("a SoC");
    files.push((CONFIGURATION.to_owned(), file.path().to_owned()));
    but_for_the_emulator(|| linux_lives(&config, &["--sandbox", "on"]));
}

fn linux_lives(config: &BedConfig, args: &[&str]) {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    let bed = config.start().unwrap();
    let args = args.iter().map(|&arg| arg.to_owned()).collect();
    let spec = bed.soc.as_ref().map(|soc| {
        serve_pool(soc);
        "pool".to_owned()
    });
    let vm = VmConfig { args, spec, ..VmConfig::new("linux", 0) };
    let mut vmm = Vmm::run(&bed, &vm).unwrap();
    is_up(&mut vmm, vm.cpus);
    if let Some(soc) = &bed.soc {
        pool_has(soc, "used");
    }
    vmm.type_text("echo $((6 * 7)) is the answer; nproc\n").unwrap();
    vmm.expect("42 is the answer\r\n2\r\n", ANSWER_LIMIT).unwrap();
    vmm.type_text("dmesg | grep -o 'detected: KVM'; echo $?\n").unwrap();
    vmm.expect("detected: KVM\r\n0\r\n", ANSWER_LIMIT).unwrap();

    vmm.expect("# ", ANSWER_LIMIT).unwrap();
    vmm.type_text("reboot -f\n").unwrap();
    is_up(&mut vmm, vm.cpus);

    // Both resets take the same way on an Arm SoC, and a boot takes longest there.
    if bed.soc.is_none() {
        does(&vmm, &["reset"]);
        is_up(&mut vmm, vm.cpus);
    }

    // Paused, so that both sides count the same exits.
    does(&vmm, &["pause"]);
    let counters = Counters::of_status(&does(&vmm, &["status", "--json"]));
    counters.agree();
    assert!(counters.get("exits.pio") > 1000, "a kernel's boot takes port exits: {counters:?}");
    does(&vmm, &["resume"]);

    // The server's user space is its first process and a shim for each function: the VM's, and the host function's.
    let programs = bed.server.programs().unwrap();
    let shims: Vec<_> = programs.iter().filter(|program| program.command[0] == SHIM).collect();
    assert_eq!((programs.len(), shims.len()), (3, 2), "{programs:?}");
    shims.iter().for_each(|shim| shim_is_small(&bed.server, shim.pid, vm.cpus as usize));

    vmm.type_text("poweroff -f\n").unwrap();
    assert_eq!(vmm.wait_for_exit(ANSWER_LIMIT).unwrap(), Status::Code(0), "{}", vmm.errors());
    assert_eq!(vmm.complaints(), "");
    drop(vmm);
    if let Some(soc) = &bed.soc {
        // The kernel lets it be opened once the VM's soc-vmm has let go of all of it.
        pool_has(soc, "free");
    }
    bed.server.power_off(ANSWER_LIMIT).unwrap();
}

/// Has a pool hand the SoC's function out, through VFIO.
fn serve_pool(soc: &Machine) {
    let functions = soc.inventory().unwrap().pci;
    let function = functions.iter().find(|function| function.id == SOC_VM).expect("a function of the card");
    soc.write(CONFIGURATION, &format!("[pool]\nfunctions = [\"pci:{}\"]\n", function.address)).unwrap();
    soc.run(SOC_VMM, &["pool", "serve"], None).unwrap();
    pool_has(soc, "free");
}

/// Waits until the pool's only function is in a state.
fn pool_has(soc: &Machine, state: &str) {
    let end = Instant::now() + ANSWER_LIMIT;
    let wanted = format!("\"state\": \"{state}\"");
    loop {
        let list = soc.exec(SOC_VMM, &["pool", "list", "--json"], ANSWER_LIMIT).unwrap();
        if list.stdout.contains(&wanted) {
            return;
        }
        assert!(Instant::now() < end, "the function is not {state}: {}{}", list.stdout, list.stderr);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits for the guest's own init, and its prompt.
fn is_up(vmm: &mut Vmm<'_>, cpus: u32) {
    vmm.expect(&format!("{UP_MARK}{cpus}"), BOOT_LIMIT).unwrap();
    vmm.expect("# ", ANSWER_LIMIT).unwrap();
}

/// Runs a soc-vmm command on the VM; what it printed.
fn does(vmm: &Vmm<'_>, verb: &[&str]) -> String {
    let ended = vmm.command(verb).unwrap();
    assert_eq!(ended.status, Status::Code(0), "{verb:?}: {}", ended.stderr);
    ended.stdout
}
