//! Debian's unmodified libvirtd on an Arm SoC runs an x86 guest on the host server: what it refuses there, and a domain's life.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use integration::libvirt::{Boot, Domain, Operated, check_messages};
use integration::machines::but_for_the_emulator;
use integration::test_name;
use payloads::operated::{self, keys};
use serde_json::Value;
use testbed::bed::{Bed, BedConfig};
use testbed::card::{SOC_HOST, SOC_VM};
use testbed::libvirt::{Libvirt, SocLibvirt};
use testbed::protocol::{Ended, PciId, Status};

/// How long a domain may take to come to a state.
const LIMIT: Duration = Duration::from_secs(90);
const NAME: &str = "operated";
/// Its kernel, among what libvirtd's SoC has.
const KERNEL: &str = "operated.elf";

#[test]
fn virsh_on_an_arm_soc_runs_an_x86_guest_on_the_server() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    let kernel = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kernel.path(), operated::operated().unwrap().file().1).unwrap();
    let mut config = BedConfig::new("libvirt-arm", 1).with_arm_soc();
    config.shim_args = ["--lease", "0"].map(str::to_owned).to_vec();
    let soc = config.soc.as_mut().expect("a SoC");
    SocLibvirt::equip(soc, &[(kernel.path(), KERNEL)]).unwrap();
    // It has a KVM of its own.
    soc.basics.qemu_args.extend(["-machine", "virtualization=on"].map(str::to_owned));
    but_for_the_emulator(|| {
        let bed = config.start().unwrap();
        let place = Place::new(&bed);
        // Whose fault it is shows in what everybody said.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| place.is_used())) {
            let why = panic.downcast_ref::<String>().map_or("it failed", String::as_str);
            panic!("{why}{}", place.story());
        }
    });
}

/// A SoC's libvirtd with a pool of the server's function.
struct Place<'a> {
    bed: &'a Bed,
    libvirt: SocLibvirt<'a>,
}

impl<'a> Place<'a> {
    fn new(bed: &'a Bed) -> Self {
        let soc = bed.soc.as_ref().expect("a SoC");
        let place = Self { bed, libvirt: SocLibvirt::start(soc).unwrap() };
        let pci = soc.inventory().unwrap().pci;
        let spec = |id: PciId| {
            let function = pci.iter().find(|function| function.id == id).expect("a function of the card");
            format!("pci:{}", function.address)
        };
        let config = format!(
            "[pool]\nfunctions = [{:?}]\nhost = {:?}\nusers = [\"libvirt-qemu\"]\ngroup = \"libvirt-qemu\"\n",
            spec(SOC_VM),
            spec(SOC_HOST),
        );
        place.succeeds("mkdir", &["/etc/outboard", "/run/outboard-pool"]);
        place.libvirt.write("/etc/outboard/soc-vmm.toml", &config).unwrap();
        place.libvirt.spawn(Libvirt::EMULATOR, &["pool", "serve"]).unwrap();
        place.function_is("free");
        place
    }

    fn is_used(&self) {
        self.describes_the_server();
        self.refuses_the_processor_of_the_soc();
        self.needs_something_at_dev_kvm();
        self.lives();
        self.ends_by_itself();
        check_messages(&self.libvirt.libvirtd_log().unwrap());
    }

    /// How many vCPUs are possible libvirtd asks the SoC's KVM; everything else is of the server, whose processor is QEMU's `max`.
    fn describes_the_server(&self) {
        let asked = ["domcapabilities", "--emulatorbin", Libvirt::EMULATOR, "--arch", "x86_64"];
        let told = self.virsh(&asked);
        for line in [
            "<arch>x86_64</arch>",
            "<mode name='host-passthrough' supported='no'/>",
            "<mode name='host-model' supported='no'/>",
            "<model usable='yes' vendor='unknown'>qemu64</model>",
            "<model usable='no' vendor='Intel'>Skylake-Server</model>",
        ] {
            assert!(told.contains(line), "no {line} in {told}");
        }
    }

    /// Another device's node will do: libvirtd only looks whether there is one.
    fn needs_something_at_dev_kvm(&self) {
        self.define(&domain("<cpu mode=\"maximum\"/>"));
        self.succeeds("rm", &["/dev/kvm"]);
        let why = self.virsh_fails(&["start", NAME]);
        assert!(why.contains("Domain requires KVM, but it is not available"), "{why}");
        self.succeeds("mknod", &["-m", "660", "/dev/kvm", "c", "1", "3"]);
    }

    fn refuses_the_processor_of_the_soc(&self) {
        for mode in ["host-passthrough", "host-model"] {
            self.define(&domain(&format!("<cpu mode=\"{mode}\"/>")));
            let why = self.virsh_fails(&["start", NAME]);
            let refused = format!("CPU mode '{mode}' for x86_64 kvm domain on aarch64 host is not supported");
            assert!(why.contains(&refused), "{why}");
        }
        // A processor that the server hasn't is soc-vmm's to refuse, and no reason to put the function aside.
        self.define(&domain("<cpu mode=\"custom\"><model>Skylake-Server</model></cpu>"));
        let why = self.virsh_fails(&["start", NAME]);
        assert!(why.contains("this host lacks") && why.contains("avx512f"), "{why}");
        self.function_is("free");
    }

    /// Started, used, stopped and gone on with, reset, destroyed.
    fn lives(&self) {
        self.define(&domain("<cpu mode=\"custom\"><model>qemu64</model></cpu>"));
        self.virsh(&["start", NAME]);
        self.becomes("running (booted)");
        self.function_is("used");
        self.is_confined();
        let mut guest = self.console();
        guest.answers('x');
        guest.stands_still_and_goes_on(
            || {
                self.virsh(&["suspend", NAME]);
                self.becomes("paused (user)");
            },
            || {
                self.virsh(&["resume", NAME]);
                self.becomes("running (unpaused)");
            },
        );
        self.virsh(&["reset", NAME]);
        guest.is_up();
        self.virsh(&["destroy", NAME]);
        self.becomes("shut off (destroyed)");
        self.is_gone();
    }

    /// Without a `<cpu>` it has the server's processor.
    fn ends_by_itself(&self) {
        self.define(&domain(""));
        self.virsh(&["start", NAME]);
        let mut guest = self.console();
        guest.answers('y');
        guest.does(keys::OFF);
        self.becomes("shut off (shutdown)");
        self.is_gone();
    }

    /// By stock qemu.conf it is libvirt-qemu's, without capabilities, in cgroups and a `/dev` of its own.
    fn is_confined(&self) {
        let pid = self.emulators();
        assert_eq!(pid.len(), 1, "{pid:?}");
        let proc = |file: &str| self.succeeds("cat", &[&format!("/proc/{}/{file}", pid[0])]);
        let status = proc("status");
        for line in ["Uid:\t64055\t64055\t64055\t64055", "CapEff:\t0000000000000000"] {
            assert!(status.contains(line), "no {line} in {status}");
        }
        let cgroup = proc("cgroup");
        assert!(cgroup.contains("/machine/qemu-") && cgroup.contains("-operated.libvirt-qemu"), "{cgroup}");
        let nodes = self.succeeds("ls", &[&format!("/proc/{}/root/dev", pid[0])]);
        assert!(nodes.contains("urandom") && !nodes.contains("vfio") && !nodes.contains("vda"), "{nodes}");
    }

    /// Nothing of the domain is left, neither here nor on the server.
    fn is_gone(&self) {
        self.waits("the domain's process ends", || self.emulators().is_empty());
        self.function_is("free");
        let shims = self.bed.server.programs().unwrap();
        assert_eq!(shims.len(), 3, "the server's first process, a shim for each function: {shims:?}");
    }

    /// The processes of domains: the pool is soc-vmm's other one.
    fn emulators(&self) -> Vec<i32> {
        let soc = self.bed.soc.as_ref().expect("a SoC");
        let programs = soc.programs().unwrap().into_iter();
        let is_domain_s = |command: &[String]| {
            command.first().is_some_and(|name| name == Libvirt::EMULATOR) && command.contains(&"-name".to_owned())
        };
        programs.filter(|program| is_domain_s(&program.command)).map(|program| program.pid).collect()
    }

    fn console(&self) -> Operated {
        Operated(self.libvirt.console(NAME).unwrap())
    }

    fn define(&self, domain: &Domain) {
        self.libvirt.write("/tmp/domain.xml", &domain.xml()).unwrap();
        self.virsh(&["define", "/tmp/domain.xml"]);
    }

    fn becomes(&self, state: &str) {
        self.waits(&format!("the domain becomes {state}"), || {
            self.virsh(&["domstate", "--reason", NAME]).starts_with(state)
        });
    }

    /// Waits until the pool's only function is in a state.
    fn function_is(&self, state: &str) {
        self.waits(&format!("the function is {state}"), || {
            let list = self.output(Libvirt::EMULATOR, &["pool", "list", "--json"]).stdout;
            let list: Value = serde_json::from_str(&list).unwrap_or_default();
            list[0]["state"] == state
        });
    }

    fn waits(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + LIMIT;
        while !condition() {
            assert!(Instant::now() < end, "{what}: it did not come about");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn virsh(&self, args: &[&str]) -> String {
        let ended = self.libvirt.virsh(args).unwrap();
        assert_eq!(ended.status, Status::Code(0), "virsh {args:?}: {}", ended.stderr);
        ended.stdout
    }

    /// Runs a `virsh` that fails; why.
    fn virsh_fails(&self, args: &[&str]) -> String {
        let ended = self.libvirt.virsh(args).unwrap();
        assert_ne!(ended.status, Status::Code(0), "virsh {args:?} should fail: {}", ended.stdout);
        ended.stderr
    }

    fn succeeds(&self, program: &str, args: &[&str]) -> String {
        let ended = self.output(program, args);
        assert_eq!(ended.status, Status::Code(0), "{program} {args:?}: {}", ended.stderr);
        ended.stdout
    }

    fn output(&self, program: &str, args: &[&str]) -> Ended {
        self.libvirt.output(program, args).unwrap()
    }

    /// What everybody said, for a test that fails.
    fn story(&self) -> String {
        let log = self.libvirt.read(&format!("/var/log/libvirt/qemu/{NAME}.log")).unwrap_or_default();
        let silent = self.bed.server.last_words().unwrap_or_default();
        format!("\n{NAME}.log:\n{log}\n{silent}")
    }
}

fn domain(cpu: &str) -> Domain {
    let kernel = format!("{}/{KERNEL}", Libvirt::SHARED);
    let boot = Boot::Kernel { kernel, initrd: None, cmdline: None };
    Domain { cpu: cpu.to_owned(), ..Domain::new(NAME, boot) }
}
