//! What an Arm SoC needs beside soc-vmm to boot the disk: the disk and a CD-ROM as drives of its own, and a network for the
//! guest, with a page to be fetched.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fetch;
use crate::machine::{Error, Machine};
use crate::protocol::Status;
use crate::soc::SocConfig;

use super::{Firmware, Image, PASST};

/// Where the CD-ROM is on the SoC.
pub const SOC_CD: &str = "/dev/vdb";
/// Where passt is on the SoC.
pub(super) const SOC_PASST: &str = "/bin/passt";

/// Where busybox is on the SoC.
pub(crate) const SOC_BUSYBOX: &str = "/bin/busybox";
/// Each program, and what passt is linked to, by its place on the SoC and in Debian's packages.
const FILES: [(&str, &str); 4] = [
    (SOC_BUSYBOX, "usr/bin/busybox"),
    (SOC_PASST, "usr/bin/passt"),
    ("/lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1"),
    ("/lib/aarch64-linux-gnu/libc.so.6", "usr/lib/aarch64-linux-gnu/libc.so.6"),
];

/// The port of [`serve_page`].
const PORT: u16 = 80;
/// How long a command on the SoC may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Fetches the programs that the SoC gets.
///
/// # Errors
/// [`fetch::Error`].
pub fn soc_programs() -> Result<PathBuf, fetch::Error> {
    let packages = [PASST, "busybox-static"].map(|package| format!("{package}:arm64"));
    let recipe = format!("1 {packages:?}");
    fetch::part("soc-programs", &recipe, "passt and busybox for the Arm SoC (4 MB)", |into| {
        fetch::trixie()?.unpack_closure(None, &packages.each_ref().map(String::as_str), &[], into)
    })
}

/// A busybox for the Arm SoC.
pub(crate) fn busybox_for_soc() -> Result<PathBuf, fetch::Error> {
    Ok(soc_programs()?.join("usr/bin/busybox"))
}

/// Gives a SoC that is to be started the disk of `image`, the CD-ROM `cd`, `firmware`, and the programs of [`soc_programs`]. The answer
/// is where the SoC has them; what is written to its disk ends with the SoC.
///
/// # Errors
/// [`fetch::Error`].
pub fn equip(
    soc: &mut SocConfig,
    image: &Image,
    cd: &Path,
    firmware: &Firmware,
) -> Result<(Image, Firmware), fetch::Error> {
    let programs = soc_programs()?;
    let there = Image { disk: "/dev/vda".into(), kernel: "/debian/vmlinuz".into(), initrd: "/debian/initrd".into() };
    let firmware_there = Firmware {
        seabios: "/firmware/bios-256k.bin".into(),
        ovmf_code: "/firmware/OVMF_CODE_4M.fd".into(),
        ovmf_vars: "/firmware/OVMF_VARS_4M.fd".into(),
    };
    soc.drives = vec![image.disk.clone(), cd.to_owned()];
    let files = &mut soc.basics.files;
    files.extend(FILES.map(|(there, here)| (there.to_owned(), programs.join(here))));
    for (there, here) in [
        (&there.kernel, &image.kernel),
        (&there.initrd, &image.initrd),
        (&firmware_there.seabios, &firmware.seabios),
        (&firmware_there.ovmf_code, &firmware.ovmf_code),
        (&firmware_there.ovmf_vars, &firmware.ovmf_vars),
    ] {
        files.push((there.display().to_string(), here.clone()));
    }
    Ok((there, firmware_there))
}

/// Serves `page` on the loopback interface of an equipped SoC for as long as that runs; the answer is the port.
///
/// # Errors
/// [`Error`].
pub fn serve_page(soc: &Machine, page: &str) -> Result<u16, Error> {
    soc.write("/run/index.html", page)?;
    // httpd listens when the shell ends; what it leaves behind doesn't hold the caller's streams.
    let httpd = format!("busybox httpd -p 127.0.0.1:{PORT} -h /run </dev/null >/run/httpd 2>&1");
    let script = format!("busybox ip link set lo up && {httpd} || {{ cat /run/httpd; exit 1; }}");
    let ended = soc.exec(SOC_BUSYBOX, &["sh", "-c", &script], LIMIT)?;
    match ended.status {
        Status::Code(0) => Ok(PORT),
        _ => Err(Error::file(SOC_BUSYBOX)(io::Error::other(ended.stdout + &ended.stderr))),
    }
}
