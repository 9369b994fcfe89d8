//! From a bare kernel to a machine whose functions are bound.

use std::env::set_current_dir;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::chroot;
use std::path::Path;
use std::process::ExitCode;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use testbed_init::{Module, PciId};

use crate::inspect;

/// Goes from the kernel's first root to another mount of the same files: pivot_root(2) refuses to replace the first one, and
/// programs that lock themselves in call it, as passt does.
pub(crate) fn leave_first_root() -> Result<(), String> {
    const PLACE: &str = "/root";
    let bind = |from, to, how| mount(Some(from), to, None::<&str>, how, None::<&str>);
    let leave = || -> io::Result<()> {
        fs::create_dir_all(PLACE)?;
        bind("/", PLACE, MsFlags::MS_BIND)?;
        set_current_dir(PLACE)?;
        bind(".", "/", MsFlags::MS_MOVE)?;
        chroot(".")?;
        set_current_dir("/")
    };
    leave().map_err(|e| format!("mounting the root once more: {e}"))
}

/// Mounts the kernel's file systems, and hugetlbfs where the kernel has it.
pub(crate) fn mount_all() -> Result<(), String> {
    for (source, target, kind) in [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("tmpfs", "/run", "tmpfs"),
        ("tmpfs", "/tmp", "tmpfs"),
    ] {
        mount_one(source, target, kind)?;
    }
    // A kernel may lack one of these: terminals, KVM's counters, huge pages.
    let _ = mount_one("devpts", "/dev/pts", "devpts");
    let _ = mount_one("debugfs", "/sys/kernel/debug", "debugfs");
    let _ = mount_one("hugetlbfs", "/dev/hugepages", "hugetlbfs");
    Ok(())
}

fn mount_one(source: &str, target: &str, kind: &str) -> Result<(), String> {
    fs::create_dir_all(target).map_err(|e| format!("{target}: {e}"))?;
    mount(Some(source), target, Some(kind), MsFlags::empty(), None::<&str>)
        .map_err(|e| format!("mounting {target}: {e}"))
}

pub(crate) fn name_machine(name: &str) -> Result<(), String> {
    fs::write("/proc/sys/kernel/hostname", name).map_err(|e| format!("host name: {e}"))
}

/// Loads `modules` in their order.
pub(crate) fn load_modules(modules: &[Module]) -> Result<(), String> {
    for module in modules {
        let file = File::open(&module.path).map_err(|e| format!("{}: {e}", module.path))?;
        let parameters =
            std::ffi::CString::new(module.parameters.as_str()).map_err(|e| format!("{}: {e}", module.path))?;
        finit_module(&file, &parameters, ModuleInitFlags::empty())
            .map_err(|e| format!("loading {}: {e}", module.path))?;
    }
    Ok(())
}

/// Binds every PCI function of one of `kinds` to vfio-pci and returns their addresses in order. What can't be bound is said
/// on the console and left out.
pub(crate) fn bind_functions(kinds: &[PciId]) -> Vec<(String, PciId)> {
    let functions = inspect::pci().unwrap_or_default();
    let mut bound = Vec::new();
    for function in functions {
        if !kinds.contains(&function.id) {
            continue;
        }
        match bind(&function.address) {
            Ok(()) => bound.push((function.address, function.id)),
            Err(error) => println!("testbed-init: {error}"),
        }
    }
    bound
}

/// Binds the PCI function at `address` to vfio-pci.
pub(crate) fn bind(address: &str) -> Result<(), String> {
    let device = Path::new("/sys/bus/pci/devices").join(address);
    let write = |path: &Path, text: &str| fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()));
    write(&device.join("driver_override"), "vfio-pci")?;
    let holder = device.join("driver");
    if holder.exists() {
        write(&holder.join("unbind"), address)?;
    }
    write(Path::new("/sys/bus/pci/drivers_probe"), address)?;
    // The kernel doesn't answer a probe that failed.
    if holder.exists() { Ok(()) } else { Err(format!("{address}: vfio-pci refuses it")) }
}

/// Switches the machine off. It returns only if the kernel refuses.
pub(crate) fn power_off() -> ExitCode {
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    println!("testbed-init: power off: {error}");
    ExitCode::FAILURE
}
