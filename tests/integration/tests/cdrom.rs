//! Real firmware and a CD-ROM: SeaBIOS finds the drive behind the AHCI controller, and boots from it.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use integration::{Vm, kvm, seabios, test_name};

const SECTOR: usize = 2048;
/// Where things lie on the disc, in sectors; the first three are the standard's (ECMA-119 §6.7, El Torito 1.0 §2).
const VOLUME: usize = 16;
const BOOT_RECORD: usize = 17;
const TERMINATOR: usize = 18;
const CATALOG: usize = 19;
const PROGRAM: usize = 20;
const TEXT: usize = 21;
/// What the program reads from the disc: up to its end.
const TEXT_SECTORS: u16 = 12;
const SECTORS: usize = TEXT + TEXT_SECTORS as usize;

/// Where the firmware puts the program, and where that reads to.
const ORIGIN: u64 = 0x7c00;
const PACKET: u16 = 0x7d00;
const BUFFER: u16 = 0x9000;
const DEBUG_CONSOLE: u32 = 0x402;
const DEBUG_EXIT: u32 = 0xf4;
const READ_OK: u32 = 0x21;

/// Reads sectors through the firmware (INT 13h, function 42h), prints the first line and checks the last byte.
fn program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut out = a.create_label();
    let mut print = a.create_label();
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(si, u32::from(PACKET))?;
    a.mov(ah, 0x42)?;
    a.int(0x13)?;
    a.mov(al, ah)?;
    a.jc(out)?;
    a.mov(si, u32::from(BUFFER))?;
    a.mov(dx, DEBUG_CONSOLE)?;
    a.set_label(&mut print)?;
    a.lodsb()?;
    a.out(dx, al)?;
    a.cmp(al, i32::from(b'\n'))?;
    a.jne(print)?;
    let last = u32::from(BUFFER) + u32::from(TEXT_SECTORS) * SECTOR as u32 - 1;
    a.mov(al, byte_ptr(u64::from(last)))?;
    a.set_label(&mut out)?;
    a.mov(dx, DEBUG_EXIT)?;
    a.out(dx, al)?;
    a.hlt()?;
    let mut code = a.assemble(ORIGIN)?;
    code.resize(usize::from(PACKET) - ORIGIN as usize, 0);
    // Disk address packet: its length, sectors, where to, from where.
    code.extend([16, 0]);
    code.extend([TEXT_SECTORS, BUFFER, 0].map(u16::to_le_bytes).concat());
    code.extend((TEXT as u64).to_le_bytes());
    Ok(code)
}

/// A disc that boots without emulating a floppy.
fn disc() -> Vec<u8> {
    let mut disc = vec![0; SECTORS * SECTOR];
    let mut put = |sector: usize, at: usize, bytes: &[u8]| {
        disc[sector * SECTOR + at..][..bytes.len()].copy_from_slice(bytes);
    };
    put(VOLUME, 0, b"\x01CD001\x01");
    put(BOOT_RECORD, 0, b"\x00CD001\x01EL TORITO SPECIFICATION");
    put(BOOT_RECORD, 71, &(CATALOG as u32).to_le_bytes());
    put(TERMINATOR, 0, b"\xffCD001\x01");
    // The validation entry: its words add up to 0.
    put(CATALOG, 0, &[1]);
    put(CATALOG, 28, &0u16.wrapping_sub(1).wrapping_sub(0xaa55).to_le_bytes());
    put(CATALOG, 30, &[0x55, 0xaa]);
    // Bootable, no emulation, four sectors of 512 bytes.
    put(CATALOG, 32, &[0x88]);
    put(CATALOG, 38, &4u16.to_le_bytes());
    put(CATALOG, 40, &(PROGRAM as u32).to_le_bytes());
    put(PROGRAM, 0, &program().expect("instructions that exist"));
    put(TEXT, 0, b"read from the disc\n");
    put(SECTORS - 1, SECTOR - 1, &[READ_OK as u8]);
    disc
}

#[test]
fn a_medium_is_taken_out_and_another_put_in_while_the_vm_runs() {
    if !kvm(&test_name()) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [iso, other, firmware] = ["a.iso", "b.iso", "firmware"].map(|name| directory.path().join(name));
    std::fs::write(&iso, disc()).unwrap();
    std::fs::write(&other, disc()).unwrap();
    // A jump to itself at the reset vector.
    let mut code = vec![0; 0x1_0000];
    code[0xfff0..0xfff2].copy_from_slice(&[0xeb, 0xfe]);
    std::fs::write(&firmware, code).unwrap();
    let name = format!("cd-{}", std::process::id());
    let files = ["--firmware", firmware.to_str().unwrap(), "--cdrom", iso.to_str().unwrap()];
    let mut vm = Vm::run(&[&files[..], &["--memory", "16M", "--name", &name]].concat());
    vm.wait_until("it runs", |vm| vm.try_command(&["status"]).is_ok_and(|said| said.contains("running")));
    let open_files = |vm: &Vm| {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
        let links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        let names = links.filter_map(|link| Some(link.file_name()?.to_str()?.to_owned()));
        names.filter(|name| name.ends_with(".iso")).collect::<Vec<_>>()
    };
    assert_eq!(open_files(&vm), ["a.iso"]);
    vm.soc_vmm(&["insert", &name, other.to_str().unwrap()]).unwrap();
    vm.wait_until("the first is closed", |vm| open_files(vm) == ["b.iso"]);
    vm.soc_vmm(&["eject", &name]).unwrap();
    vm.wait_until("the second is closed", |vm| open_files(vm).is_empty());
    let refused = vm.soc_vmm(&["insert", &name, "/no/such/image"]).unwrap_err();
    assert!(refused.contains("/no/such/image") && refused.lines().count() == 1, "{refused}");
    vm.soc_vmm(&["insert", &name, iso.to_str().unwrap()]).unwrap();
    assert_eq!(open_files(&vm), ["a.iso"]);
    vm.command(&["quit"]);
    assert_eq!(vm.wait().status.code(), Some(0));
}

#[test]
fn seabios_boots_from_a_cd() {
    let Some(firmware) = seabios() else { return };
    let directory = tempfile::tempdir().unwrap();
    let iso = directory.path().join("disc.iso");
    std::fs::write(&iso, disc()).unwrap();
    let args = ["--firmware", &firmware, "--memory", "64M", "--debug-exit"];
    let ended = Vm::run(&[&args[..], &["--cdrom", iso.to_str().unwrap()]].concat()).wait();
    assert!(ended.debugcon.contains("Outboard CD-ROM"), "{}", ended.debugcon);
    assert!(ended.debugcon.contains("read from the disc\n"), "{}", ended.debugcon);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some((READ_OK << 1 | 1) as i32), ""));
}
