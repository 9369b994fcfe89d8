//! What a person types at a running VM, and what the guest feels of it.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use integration::hostile::wait_until;
use integration::{Vm, kvm, program, test_name};
use payloads::{Privilege, hot, ports, smp, watch};
use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything here may take on a busy machine.
const MOST: Duration = Duration::from_secs(120);

/// A VM whose guest says a line each 500 reads of a port, for ever.
fn busy(more: &[&str]) -> Vm {
    Vm::payload(&hot::read_port(Privilege::Cpl0, ports::ECHO, 500, u32::MAX).unwrap(), more)
}

fn status(vm: &Vm) -> Value {
    serde_json::from_str(&vm.command(&["status", "--json"])).unwrap()
}

fn exits(vm: &Vm) -> u64 {
    status(vm)["counters"]["exits.pio"].as_u64().unwrap()
}

/// Whether the guest stands still: its exits don't grow while its soc-vmm answers.
fn assert_stands_still(vm: &Vm) {
    let before = exits(vm);
    for _ in 0..3 {
        assert_eq!(exits(vm), before);
    }
}

#[test]
fn a_paused_guest_stands_still_and_a_resumed_one_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = busy(&[]);
    vm.debugcon_has("count ");
    assert_eq!(status(&vm)["status"], "running");
    vm.command(&["pause"]);
    assert_eq!(status(&vm)["status"], "paused");
    assert_stands_still(&vm);
    let before = exits(&vm);
    vm.command(&["resume"]);
    assert_eq!(status(&vm)["status"], "running");
    vm.wait_until("exits grow", |vm| exits(vm) > before);
    // Again, and twice: what is paused stays so.
    vm.command(&["pause"]);
    vm.command(&["pause"]);
    assert_stands_still(&vm);
    vm.command(&["quit"]);
    assert_eq!(vm.wait().status.code(), Some(0));
}

#[test]
fn a_guest_that_is_started_paused_waits_to_be_resumed() {
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = busy(&["--paused"]);
    vm.wait_until("it is built", |vm| vm.try_command(&["status", "--json"]).is_ok());
    let first = status(&vm);
    assert_eq!((&first["status"], &first["counters"]["exits.pio"]), (&Value::from("prelaunch"), &Value::from(0)));
    assert_stands_still(&vm);
    vm.command(&["resume"]);
    vm.debugcon_has("count ");
    vm.command(&["quit"]);
    assert_eq!(vm.wait().status.code(), Some(0));
}

/// A firmware image whose code begins right at the reset vector's jump: real mode, all segments 0 but CS.
fn firmware(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    const SIZE: usize = 0x1_0000;
    const RESET: usize = 0xfff0;
    let assemble = || {
        let mut a = CodeAssembler::new(16)?;
        code(&mut a)?;
        let code = a.assemble(0)?;
        let mut reset = CodeAssembler::new(16)?;
        reset.jmp_far(0xf000, 0)?;
        let mut image = vec![0; SIZE];
        image[..code.len()].copy_from_slice(&code);
        let reset = reset.assemble(RESET as u64)?;
        image[RESET..RESET + reset.len()].copy_from_slice(&reset);
        Ok::<_, IcedError>(image)
    };
    assemble().unwrap()
}

/// Runs firmware; what it writes to the serial port and the debug console is kept.
fn run_firmware(image: &[u8], more: &[&str]) -> (Vm, TempDir) {
    let place = TempDir::new().unwrap();
    let file = place.path().join("firmware");
    std::fs::write(&file, image).unwrap();
    let args = [&["--firmware", file.to_str().unwrap(), "--memory", "16M"], more].concat();
    (Vm::run(&args), place)
}

fn say(a: &mut CodeAssembler, byte: u8) -> Result<(), IcedError> {
    a.mov(dx, u32::from(ports::DEBUG_CONSOLE))?;
    a.mov(al, u32::from(byte))?;
    a.out(dx, al)
}

/// ACPI's PM1a status and control, as the FADT gives them.
const PM1_STATUS: u32 = 0x600;
const PM1_CONTROL: u32 = 0x604;
const POWER_BUTTON: u32 = 1 << 8;
/// SLP_EN, with SLP_TYP 0: S5.
const POWER_OFF: u32 = 1 << 13;

/// Points the configuration ports at a register's word of a function on the root bus; DX is its first byte's port then.
fn configure(a: &mut CodeAssembler, devfn: u32, register: u32) -> Result<(), IcedError> {
    a.mov(dx, 0xcf8)?;
    a.mov(eax, 1 << 31 | devfn << 8 | register & 0xfc)?;
    a.out(dx, eax)?;
    a.mov(dx, 0xcfc + (register & 3))
}

/// Has the LPC bridge answer for ACPI's registers, as firmware does.
fn open_acpi(a: &mut CodeAssembler) -> Result<(), IcedError> {
    const LPC: u32 = 0x1f << 3;
    configure(a, LPC, 0x40)?;
    a.mov(eax, PM1_STATUS | 1)?;
    a.out(dx, eax)?;
    configure(a, LPC, 0x44)?;
    a.mov(al, 0x80)?;
    a.out(dx, al)
}

fn power_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, PM1_CONTROL)?;
    a.mov(ax, POWER_OFF)?;
    a.out(dx, ax)?;
    a.hlt()
}

#[test]
fn a_pressed_power_button_reaches_the_guest_which_powers_off() {
    if !kvm(&test_name()) {
        return;
    }
    let image = firmware(|a| {
        let mut look = a.create_label();
        open_acpi(a)?;
        say(a, b'r')?;
        a.mov(dx, PM1_STATUS)?;
        a.set_label(&mut look)?;
        a.in_(ax, dx)?;
        a.test(ax, POWER_BUTTON)?;
        a.je(look)?;
        say(a, b'p')?;
        power_off(a)
    });
    let (mut vm, _place) = run_firmware(&image, &[]);
    vm.debugcon_has("r");
    vm.command(&["powerdown"]);
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.debugcon.as_str(), ended.stderr.as_str()), (Some(0), "rp", ""));
}

#[test]
fn a_reset_guest_begins_anew_with_its_devices_and_its_chipset() {
    if !kvm(&test_name()) {
        return;
    }
    // Says what it found in two registers, spoils them, and goes round for ever.
    let image = firmware(|a| {
        let mut round = a.create_label();
        // PAM1: 0, then RAM at 0xc0000.
        configure(a, 0, 0x91)?;
        a.in_(al, dx)?;
        a.mov(bl, al)?;
        a.mov(al, 3)?;
        a.out(dx, al)?;
        a.mov(dx, u32::from(ports::DEBUG_CONSOLE))?;
        a.mov(al, bl)?;
        a.add(al, i32::from(b'a'))?;
        a.out(dx, al)?;
        a.in_(al, 0xe0)?; // pc-testdev's word: 0
        a.add(al, i32::from(b'a'))?;
        a.out(dx, al)?;
        a.mov(al, 7)?;
        a.out(0xe0, al)?;
        a.mov(al, u32::from(b'\n'))?;
        a.out(dx, al)?;
        a.set_label(&mut round)?;
        a.in_(al, 0xe1)?;
        a.jmp(round)
    });
    let (mut vm, _place) = run_firmware(&image, &["--debug-exit"]);
    vm.debugcon_has("aa\n");
    vm.command(&["reset"]);
    vm.debugcon_has("aa\naa\n");
    assert_eq!(status(&vm)["status"], "running");
    let before = exits(&vm);
    vm.wait_until("it runs", |vm| exits(vm) > before);
    // A paused one stays where it begins until it is resumed.
    vm.command(&["pause"]);
    vm.command(&["reset"]);
    assert_stands_still(&vm);
    vm.command(&["resume"]);
    vm.debugcon_has("aa\naa\naa\n");
    vm.command(&["quit"]);
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.debugcon.as_str()), (Some(0), "aa\naa\naa\n"));
}

#[test]
fn a_reset_leaves_memory_alone_that_no_image_is_loaded_to() {
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = Vm::payload(&watch::watch(7).unwrap(), &[]);
    vm.debugcon_has("round 0000000000000002 ");
    vm.command(&["reset"]);
    vm.debugcon_has(&format!("\nreset sum {0:016x}\nround 0000000000000001 sum {0:016x}\n", watch::sum(7)));
    vm.command(&["quit"]);
    assert_eq!(vm.wait().status.code(), Some(0));
}

#[test]
fn a_triple_fault_resets_the_machine_and_the_log_says_where_the_vcpu_stood() {
    if !kvm(&test_name()) {
        return;
    }
    let image = firmware(|a| {
        say(a, b'r')?;
        // Memory is zero: neither descriptors nor vectors lie within their tables.
        a.lgdt(ptr(0x500))?;
        a.lidt(ptr(0x500))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.mov(ax, 8)?;
        a.mov(ds, ax)?;
        a.hlt()
    });
    let (mut vm, _place) = run_firmware(&image, &["--log", "info"]);
    vm.debugcon_has("rr");
    vm.command(&["quit"]);
    let ended = vm.wait();
    let line = ended.stderr.lines().find(|line| line.contains("a triple fault resets the machine: rip 0x"));
    let line = line.unwrap_or_else(|| panic!("{}", ended.stderr));
    assert!(line.contains(" cr0 0x") && line.contains("vcpu=0"), "{line}");
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
}

#[test]
fn a_reset_stops_every_processor_until_the_first_starts_it_again() {
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = Vm::payload(&smp::halted(4).unwrap(), &[]);
    let came_up =
        |vm: &Vm| std::fs::read_to_string(vm.file("debugcon")).unwrap_or_default().matches("halted\n").count();
    vm.wait_until("it comes up", |vm| came_up(vm) == 1);
    for _ in 0..5 {
        let before = came_up(&vm);
        // Halted, and on its way up.
        vm.command(&["reset"]);
        vm.command(&["reset"]);
        vm.wait_until("it comes up again", |vm| came_up(vm) > before);
    }
    vm.command(&["quit"]);
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_list_shows_what_runs_and_a_vm_that_quit_is_gone() {
    if !kvm(&test_name()) {
        return;
    }
    let name = format!("listed-{}", std::process::id());
    let mut vm = busy(&["--name", &name]);
    vm.debugcon_has("count ");
    let pid = vm.pid();
    // Other tests' VMs may be listed too.
    let listed = |vm: &Vm| -> Option<Value> {
        let all: Vec<Value> = serde_json::from_str(&vm.soc_vmm(&["list", "--json"]).unwrap()).unwrap();
        all.into_iter().find(|vm| vm["name"] == name.as_str())
    };
    // On a busy machine it may not answer in the second that a list waits for each.
    let answering = |vm: &Vm| loop {
        let shown = listed(vm).expect("it is listed");
        if shown["status"] != "silent" {
            return shown;
        }
    };
    let shown = answering(&vm);
    let shown = ["status", "cpus", "memory", "pid"].map(|key| shown[key].clone());
    let expected: [Value; 4] = ["running".into(), 1.into(), (64 << 20).into(), pid.into()];
    assert_eq!(shown, expected);
    // By its name, as well as by its socket.
    vm.soc_vmm(&["pause", &name]).unwrap();
    assert_eq!(answering(&vm)["status"], "paused");
    vm.soc_vmm(&["quit", &name]).unwrap();
    // Who told it to end hears of its end a moment before its socket goes.
    vm.wait_until("it is listed no more", |vm| listed(vm).is_none());
    let (qmp, shims) = (vm.file("qmp"), children(pid));
    assert_eq!(vm.wait().status.code(), Some(0));
    assert!(!qmp.exists(), "its socket is gone");
    wait_until("its shim is gone", MOST, || shims.iter().all(|shim| !running_shim(*shim)));
}

/// Processes that `pid` has started.
fn children(pid: u32) -> Vec<u32> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

fn running_shim(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "host-kvm-shim")
}

#[test]
fn a_debug_exit_gives_its_value_as_status() {
    if !kvm(&test_name()) {
        return;
    }
    for (value, status) in [(0, 1), (1, 3), (0x21, 0x43), (0x7f, 0xff), (0x80, 1)] {
        let image = firmware(|a| {
            a.mov(al, value)?;
            a.out(u32::from(ports::DEBUG_EXIT), al)?;
            a.hlt()
        });
        let (vm, _place) = run_firmware(&image, &["--debug-exit"]);
        let ended = vm.wait();
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(status), ""), "value {value:#x}");
    }
}

#[test]
fn the_serial_port_on_standard_input_and_output_carries_every_byte_both_ways() {
    if !kvm(&test_name()) {
        return;
    }
    const DATA: u32 = 0x3f8;
    const LINE_STATUS: u32 = 0x3fd;
    const READY: u32 = 1;
    // Gives back each byte, one higher; powers off after a 0xff.
    let image = firmware(|a| {
        let [mut look, mut last] = [0; 2].map(|_| a.create_label());
        open_acpi(a)?;
        a.set_label(&mut look)?;
        a.mov(dx, LINE_STATUS)?;
        a.in_(al, dx)?;
        a.test(al, READY as i32)?;
        a.je(look)?;
        a.mov(dx, DATA)?;
        a.in_(al, dx)?;
        a.inc(al)?;
        a.out(dx, al)?;
        a.je(last)?;
        a.jmp(look)?;
        a.set_label(&mut last)?;
        power_off(a)
    });
    let place = TempDir::new().unwrap();
    let file = place.path().join("firmware");
    std::fs::write(&file, image).unwrap();
    let mut child = Command::new(program("soc-vmm"))
        .args(["run", "--memory", "16M", "--firmware"])
        .arg(&file)
        .env("XDG_RUNTIME_DIR", place.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // More than any queue between here and there holds.
    let sent: Vec<u8> = (0..3000u32).map(|n| (n * 7 % 255) as u8).chain([0xff]).collect();
    let expected: Vec<_> = sent.iter().map(|byte| byte.wrapping_add(1)).collect();
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        input.write_all(&sent).unwrap();
        input
    });
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    drop(writer.join().unwrap());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(got, expected);
}

#[test]
fn a_guest_that_tells_of_its_panic_ends_as_failed() {
    if !kvm(&test_name()) {
        return;
    }
    // A kernel that another one takes over from is no end; the panic is.
    let image = firmware(|a| {
        a.mov(dx, 0x505)?;
        a.mov(al, 2)?;
        a.out(dx, al)?;
        say(a, b'c')?;
        a.mov(dx, 0x505)?;
        a.mov(al, 1)?;
        a.out(dx, al)?;
        a.hlt()
    });
    let (vm, _place) = run_firmware(&image, &[]);
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.debugcon.as_str()), (Some(6), "c"));
    assert!(ended.stderr.contains("the guest's kernel panicked"), "{}", ended.stderr);
}
