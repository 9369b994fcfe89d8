//! What is left to a shim's threads once they run: no privileges, and no descriptor that it was not meant to have.

mod soc;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;

use api_channel::call::{Call, Irqchip};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use soc::Soc;

fn status(path: &std::path::Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path.join("status")).unwrap();
    text.lines().filter_map(|l| l.split_once(':')).map(|(k, v)| (k.to_owned(), v.trim().to_owned())).collect()
}

#[test]
fn every_thread_is_confined_and_nothing_that_was_inherited_is_open() {
    if !soc::has_kvm() {
        return;
    }
    // A descriptor that whoever starts the shim forgot to close.
    let secret = tempfile();
    fcntl(&secret, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut soc = Soc::start(&[]);
    fcntl(&secret, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    // hlt; jmp back
    soc.real_mode(2, Irqchip::Full, &[0xf4, 0xeb, 0xfd]);
    soc.run();
    soc.ok(&Call::Ping);
    let pid = soc.child.as_ref().unwrap().id();
    let mut filters = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = status(&thread.unwrap().path());
        let name = &status["Name"];
        // KVM's own thread in the process runs no code of the program.
        if name.starts_with("kvm-") {
            continue;
        }
        assert_eq!(status["Seccomp"], "2", "{name}");
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        for set in ["CapInh", "CapPrm", "CapEff"] {
            assert_eq!(status[set], "0000000000000000", "{name}: {set}");
        }
        filters.insert(name.clone(), status["Seccomp_filters"].parse::<u32>().unwrap());
    }
    assert_eq!(filters.len(), 3, "{filters:?}");
    assert_eq!(filters["vcpu0"], filters["host-kvm-shim"] + 1, "a vCPU's thread is confined further");
    assert_eq!(filters["vcpu1"], filters["vcpu0"]);
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = fs::read_link(fd.unwrap().path()).unwrap();
        assert!(!target.to_string_lossy().contains("outboard-forgotten"), "{}", target.display());
    }
    assert!(secret.as_raw_fd() > 2);
    assert!(soc.shut_down().success());
}

fn tempfile() -> std::os::fd::OwnedFd {
    pcie_function::local::sealed_memfd("outboard-forgotten", 4096).unwrap()
}
