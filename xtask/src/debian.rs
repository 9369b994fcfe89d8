//! `cargo xtask testbed debian`: a Debian on a disk for a guest in whom every device has its driver.

use std::path::Path;
use std::process::ExitCode;

use testbed::debian::{self, COMMAND_LINE, PASSWORD, USER};

use crate::step::with_sources;

/// Makes what is missing, copies the disk to `disk`, and prints what soc-vmm is to be told.
pub(crate) fn copy(disk: &Path) -> Result<ExitCode, String> {
    let failed = |error: &dyn std::error::Error| format!("{}: {}", disk.display(), with_sources(error));
    if disk.exists() {
        return Err(format!("{} is there already: remove it, or name another file", disk.display()));
    }
    let image = debian::image().map_err(|e| with_sources(&e))?;
    let firmware = debian::tools().map_err(|e| with_sources(&e))?.firmware();
    image.copy_disk(disk).map_err(|e| failed(&e))?;
    println!("{} is a Debian; {USER}'s password is {PASSWORD}. What soc-vmm is told:", disk.display());
    println!(
        "  --memory 512M --disk file={} --kernel {} --initrd {} --cmdline '{COMMAND_LINE}'",
        disk.display(),
        image.kernel.display(),
        image.initrd.display()
    );
    println!("or, instead of a kernel, --firmware {}", firmware.seabios.display());
    println!("or --firmware {} --nvram VARS, a copy of {}", firmware.ovmf_code.display(), firmware.ovmf_vars.display());
    Ok(ExitCode::SUCCESS)
}
