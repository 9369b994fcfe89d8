//! Writes every payload as a file that a VMM takes.

use std::path::PathBuf;
use std::process::ExitCode;

use payloads::{Image, Payload, catalogue};

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: payloads DIRECTORY");
        return ExitCode::from(2);
    };
    let payloads = match catalogue(2) {
        Ok(payloads) => payloads,
        Err(error) => {
            eprintln!("a payload does not assemble: {error}");
            return ExitCode::FAILURE;
        }
    };
    for payload in &payloads {
        for (extension, bytes) in files(payload) {
            let path = directory.join(payload.name).with_extension(extension);
            if let Err(error) = std::fs::write(&path, bytes) {
                eprintln!("{}: {error}", path.display());
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn files(payload: &Payload) -> Vec<(&'static str, Vec<u8>)> {
    match &payload.image {
        Image::Kernel(kernel) => vec![("elf", kernel.pvh_elf()), ("multiboot", kernel.multiboot())],
        Image::Firmware(firmware) => vec![("rom", firmware.bytes().to_vec())],
    }
}
