//! soc-vmm's command line: what is accepted is possible, what is refused is one line.
#![no_main]

use fuzz::{is_one_line, words};
use libfuzzer_sys::fuzz_target;
use soc_vmm::cli::{ExitStatus, Invocation};
use soc_vmm::cpuid::MAX_CPUS;

fuzz_target!(|data: &[u8]| {
    let args = std::iter::once("soc-vmm".into()).chain(words(data));
    match Invocation::parse(args) {
        Ok(Invocation::Run(config)) => {
            assert!((1..=MAX_CPUS).contains(&config.cpus.into()));
            assert!(config.cpus > 0 && u32::from(config.cpus) <= config.topology.cpus());
            assert!(config.memory.size != 0 && config.memory.size.is_multiple_of(4096));
            assert!(config.cpu_affinity.0.iter().all(|(vcpu, _)| u32::from(*vcpu) < config.topology.cpus()));
        }
        Ok(_) => {}
        Err(failure) => {
            assert_eq!(failure.status(), ExitStatus::Usage);
            assert!(is_one_line(&failure.to_string()), "{failure:?}");
        }
    }
});
