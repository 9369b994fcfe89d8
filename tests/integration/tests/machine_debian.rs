//! A Debian on a disk of its own, unchanged, on an emulated server: through SeaBIOS and GRUB, through OVMF and GRUB, and by its
//! kernel alone, the first of these from an Arm SoC too. It is logged into on its serial line, mounts a CD-ROM, fetches a page
//! through passt, and finds nothing to complain about in the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use integration::machines::{PageServer, but_for_the_emulator, complaints};
use integration::test_name;
use testbed::bed::{Bed, BedConfig};
use testbed::debian::{self, Answer, COMMAND_LINE, Firmware, Image, Passt, Shell, Tools};
use testbed::protocol::Status;
use testbed::server::slow_periodic_timers;
use testbed::vmm::{Boot, VmConfig, Vmm};

/// How long firmware, GRUB and Debian may take together. Well under a minute on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn debian_boots_through_seabios_and_grub() {
    but_for_the_emulator(|| _ = Place::new("debian-bios").as_ref().map(through_seabios));
}

#[test]
fn debian_boots_through_ovmf_and_grub_and_what_it_tells_the_firmware_stays() {
    but_for_the_emulator(|| _ = Place::new("debian-uefi").as_ref().map(through_ovmf));
}

#[test]
fn debian_boots_by_its_kernel() {
    but_for_the_emulator(|| _ = Place::new("debian-direct").as_ref().map(by_its_kernel));
}

#[test]
fn debian_boots_from_an_arm_soc() {
    but_for_the_emulator(|| _ = Place::on_an_arm_soc("debian-arm").as_ref().map(through_seabios));
}

fn through_seabios(place: &Place) {
    let mut vm = place.run(&["--firmware", path(&place.firmware.seabios)]);
    let mut guest = vm.log_in();
    assert_eq!(guest.run("test -d /sys/firmware/efi").status, 1, "no UEFI");
    guest.does_all(Tables::Read);
    vm.ends();
}

fn through_ovmf(place: &Place) {
    const NAME: &str = "debian";
    let firmware = ["--firmware", path(&place.firmware.ovmf_code), "--nvram", path(&place.firmware.ovmf_vars)];
    slow_periodic_timers(&place.bed.server).unwrap();

    let mut vm = place.run(&firmware);
    // Without an entry, the firmware takes the loader that lies where it looks by itself.
    assert_eq!(vm.grub_is_of(), "(hd0,gpt2)/EFI/BOOT");
    let mut guest = vm.log_in();
    let before = guest.succeeds("efibootmgr");
    assert!(!before.contains(NAME), "{before}");
    let (partition, loader) = (debian::EFI_PARTITION, debian::EFI_LOADER);
    let create = format!("efibootmgr --create --disk /dev/vda --part {partition} --label {NAME} --loader '{loader}'");
    guest.succeeds(&create);
    // OVMF takes them by the same loader as SeaBIOS.
    guest.does_all(Tables::Same);
    vm.ends();

    // Another soc-vmm; nothing is left of the first one but the variable store's file.
    let mut vm = place.run(&firmware);
    assert_eq!(vm.grub_is_of(), "(hd0,gpt2)/EFI/debian");
}

fn by_its_kernel(place: &Place) {
    let (kernel, initrd) = (path(&place.image.kernel), path(&place.image.initrd));
    let mut vm = place.run(&["--kernel", kernel, "--initrd", initrd, "--cmdline", COMMAND_LINE]);
    vm.log_in().does_all(Tables::Read);
    vm.ends();
}

/// An emulated server, and what a VM on it is started with, as soc-vmm finds it where it runs.
struct Place {
    /// The VM's: that of no other test, on this machine or of another user's.
    name: String,
    bed: Bed,
    image: Image,
    firmware: Firmware,
    cd: PathBuf,
    /// The port of the page's server.
    page: u16,
    /// That server, unless it is the SoC's.
    _server: Option<PageServer>,
    tools: Tools,
    dir: tempfile::TempDir,
}

/// What the CD and the page hold.
const TEXT: &str = "an unlikely text, 6d1f0c52";

impl Place {
    /// Where soc-vmm runs on this machine.
    fn new(name: &str) -> Option<Self> {
        let Parts { image, firmware, cd, tools, dir } = Parts::new()?;
        let (disk, ovmf_vars) = (dir.path().join("disk"), dir.path().join("vars"));
        image.copy_disk(&disk).unwrap();
        fs::copy(&firmware.ovmf_vars, &ovmf_vars).unwrap();
        let (image, firmware) = (Image { disk, ..image }, Firmware { ovmf_vars, ..firmware });
        let bed = BedConfig::new(name, 1).start().unwrap();
        let server = PageServer::start(TEXT).unwrap();
        let name = format!("{name}-{}", std::process::id());
        Some(Self { name, bed, image, firmware, cd, page: server.port(), _server: Some(server), tools, dir })
    }

    /// Where soc-vmm, passt and the page's server run on an Arm SoC.
    fn on_an_arm_soc(name: &str) -> Option<Self> {
        let Parts { image, firmware, cd, tools, dir } = Parts::new()?;
        let mut config = BedConfig::new(name, 1).with_arm_soc();
        let soc = config.soc.as_mut().unwrap();
        let (image, firmware) = debian::equip(soc, &image, &cd, &firmware).unwrap();
        let bed = config.start().unwrap();
        let page = debian::serve_page(bed.soc.as_ref().unwrap(), TEXT).unwrap();
        let name = name.to_owned();
        Some(Self { name, bed, image, firmware, cd: debian::SOC_CD.into(), page, _server: None, tools, dir })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a VM that boots as `boot` says.
    fn run(&self, boot: &[&str]) -> Vm<'_> {
        let passt = match &self.bed.soc {
            Some(soc) => Passt::start_on(soc).unwrap(),
            None => Passt::start(&self.tools, self.file("passt")).unwrap(),
        };
        let disk = format!("file={}", self.image.disk.display());
        let net = format!("stream={}", passt.socket().display());
        let mut args = boot.to_vec();
        args.extend(["--disk", &disk, "--cdrom", path(&self.cd), "--net", &net, "--cpus", "2,maxcpus=4"]);
        let args = args.into_iter().map(str::to_owned).collect();
        let config = VmConfig { boot: Boot::AsTold, args, ..VmConfig::new(&self.name, 0) };
        let slow = self.bed.soc.is_some();
        Vm { vmm: Vmm::run(&self.bed, &config).unwrap(), page: self.page, slow, _passt: passt }
    }
}

/// What every place is made of.
struct Parts {
    image: Image,
    firmware: Firmware,
    cd: PathBuf,
    tools: Tools,
    dir: tempfile::TempDir,
}

impl Parts {
    fn new() -> Option<Self> {
        if !testbed::machines_or_skip(&test_name()) {
            return None;
        }
        let (image, tools) = (debian::image().unwrap(), debian::tools().unwrap());
        let dir = testbed::scratch::dir().unwrap();
        let (content, cd) = (dir.path().join("content"), dir.path().join("cd"));
        fs::create_dir(&content).unwrap();
        fs::write(content.join("text"), TEXT).unwrap();
        tools.iso("OUTBOARD", &content, &cd).unwrap();
        Some(Self { image, firmware: tools.firmware(), cd, tools, dir })
    }
}

/// A running VM and its network.
struct Vm<'a> {
    // Dropped first: passt ends with its connection.
    vmm: Vmm<'a>,
    _passt: Passt,
    /// The port of the page's server.
    page: u16,
    /// Whether all takes long there.
    slow: bool,
}

impl<'a> Vm<'a> {
    fn log_in(&mut self) -> Guest<'_, 'a> {
        Guest { shell: Shell::log_in(&mut self.vmm, BOOT_LIMIT).unwrap(), page: self.page, slow: self.slow }
    }

    /// Where GRUB was loaded from, as it says itself.
    fn grub_is_of(&mut self) -> String {
        self.vmm.read_until(debian::GRUB_SAYS, BOOT_LIMIT).unwrap();
        self.vmm.read_until("\r", LIMIT).unwrap().trim().to_owned()
    }

    /// It has been told to switch itself off.
    fn ends(mut self) {
        let status = self.vmm.wait_for_exit(LIMIT).unwrap();
        assert_eq!((status, self.vmm.complaints().as_str()), (Status::Code(0), ""), "{}", self.vmm.text());
    }
}

/// What a Debian does with the machine's ACPI tables beside using them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tables {
    /// It takes them apart.
    Read,
    /// Nothing: another test takes the same ones apart.
    Same,
}

/// A Debian that somebody is logged into.
struct Guest<'v, 'a> {
    shell: Shell<'v, 'a>,
    page: u16,
    slow: bool,
}

impl Guest<'_, '_> {
    fn run(&mut self, command: &str) -> Answer {
        self.shell.run(command, LIMIT).unwrap()
    }

    /// Runs a command that succeeds; what it printed.
    fn succeeds(&mut self, command: &str) -> String {
        let Answer { status, output } = self.run(command);
        assert_eq!(status, 0, "{command}: {output}");
        output
    }

    /// All that is to be seen of a Debian, to its power-off.
    fn does_all(mut self, tables: Tables) {
        self.knows_its_processors();
        self.reads_the_cd();
        self.fetches_a_page();
        self.kernel_has_no_complaint();
        // The tools take as long as all the rest where soc-vmm is slow, and find what they find elsewhere.
        if !self.slow {
            self.lspci_has_no_complaint();
            if tables == Tables::Read {
                self.iasl_has_no_complaint();
            }
        }
        self.shell.last("poweroff").unwrap();
    }

    /// Those that are there, and those that can come.
    fn knows_its_processors(&mut self) {
        let told = self.succeeds("cd /sys/devices/system/cpu && cat online present possible");
        assert_eq!(told, "0-1\n0-1\n0-3\n");
    }

    fn reads_the_cd(&mut self) {
        self.succeeds("mount -o ro /dev/disk/by-label/OUTBOARD /mnt");
        assert_eq!(self.succeeds("cat /mnt/text; umount /mnt"), TEXT);
    }

    /// Through passt, from a server on this side of it.
    fn fetches_a_page(&mut self) {
        let interface = self.succeeds("ls /sys/class/net | grep -v '^lo$'");
        self.succeeds(&format!("udhcpc -n -q -t 10 -i {}", interface.trim()));
        let url = format!("http://{}:{}/", Passt::HOST, self.page);
        assert_eq!(self.succeeds(&format!("wget -q -T 60 -O - {url}")), TEXT);
    }

    fn kernel_has_no_complaint(&mut self) {
        let said = self.succeeds("dmesg --notime --level emerg,alert,crit,err,warn");
        assert_eq!(complaints::of_the_kernel(&said), [""; 0], "dmesg");
    }

    fn lspci_has_no_complaint(&mut self) {
        let functions = self.succeeds("lspci -vv");
        assert_eq!(complaints::of_lspci(&functions), [""; 0], "{functions}");
    }

    fn iasl_has_no_complaint(&mut self) {
        let tables = self.succeeds("mkdir /tmp/tables && cd /tmp/tables && acpidump -b && ls && iasl -d *.dat");
        assert_eq!(complaints::of_iasl(&tables), [""; 0], "{tables}");
        for table in ["apic", "dsdt", "facp", "mcfg"] {
            assert!(tables.contains(&format!("{table}.dat")), "no {table} in {tables}");
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path of the testbed is text")
}
