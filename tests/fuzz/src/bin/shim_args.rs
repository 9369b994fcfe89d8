//! host-kvm-shim's command line.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    #[cfg(target_arch = "x86_64")]
    shim::parse(data);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
});

#[cfg(target_arch = "x86_64")]
mod shim {
    use fuzz::{is_one_line, words};
    use host_kvm_shim::args::{Command, Spec, parse as parse_args};

    pub(crate) fn parse(data: &[u8]) {
        match parse_args(words(data)) {
            Ok(Command::Serve { function: Spec::Fd(fd), .. }) => assert!(fd >= 0),
            Ok(Command::Serve { function: Spec::Pci(address), .. }) => {
                assert!(address.len() == 12 && address.bytes().all(|b| b.is_ascii_hexdigit() || b":.".contains(&b)));
            }
            Ok(_) => {}
            Err(why) => assert!(is_one_line(&why), "{why:?}"),
        }
    }
}
