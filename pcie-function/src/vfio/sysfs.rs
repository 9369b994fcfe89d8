//! What the kernel says of a PCI function before it is opened (sysfs), and whether it may be.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::FunctionError;
use crate::card::profile::{Profile, Side};
use crate::header::Role;

/// PCI functions of this machine.
pub(super) const DEVICES: &str = "/sys/bus/pci/devices";
/// Class of a PCI-to-PCI bridge: base class and subclass.
const BRIDGE: u32 = 0x0604;

/// A function that may be opened.
#[derive(Debug)]
pub(super) struct Found {
    /// Its address, with its domain.
    pub(super) address: CString,
    /// Number of its IOMMU group.
    pub(super) group: u32,
    pub(super) profile: &'static Profile,
    pub(super) role: Role,
}

/// Looks for the function at `address` below `devices`.
///
/// # Errors
/// It isn't there, isn't a card's `side`, isn't held by vfio-pci, or shares its IOMMU group.
pub(super) fn find(devices: &Path, address: &str, side: Side) -> Result<Found, FunctionError> {
    let address = parse(address)?;
    let unusable = |why: String| Err(FunctionError::Unusable(format!("PCI {address} {why}")));
    let function = devices.join(&address);
    if !function.exists() {
        return unusable("isn't there: `lspci -Dd 0b0d:` lists the card's functions".into());
    }
    let (vendor, device) = (number(&function.join("vendor")), number(&function.join("device")));
    let (Some(vendor), Some(device)) = (vendor, device) else { return unusable("has no ids".into()) };
    let known = Profile::find(vendor as u16, device as u16);
    let Some((profile, found, role)) = known else {
        return unusable(format!("is {vendor:04x}:{device:04x}, no card that this program knows"));
    };
    if found != side {
        return unusable(format!("is the {found} side of a card; this program takes its {side} side"));
    }
    match link_name(&function.join("driver")) {
        Some(driver) if driver == "vfio-pci" => {}
        driver => {
            let held = driver.map_or("no driver holds it".into(), |driver| format!("driver {driver} holds it"));
            return unusable(format!(
                "is not bound to vfio-pci ({held}): modprobe vfio-pci; echo vfio-pci >{f}/driver_override; {unbind}echo {address} >/sys/bus/pci/drivers_probe",
                f = function.display(),
                unbind = if held.starts_with("no") {
                    String::new()
                } else {
                    format!("echo {address} >{}/driver/unbind; ", function.display())
                },
            ));
        }
    }
    let Some(group) = link_name(&function.join("iommu_group")).and_then(|name| name.parse().ok()) else {
        return unusable("has no IOMMU: turn it on in the firmware and the kernel (intel_iommu=on)".into());
    };
    let others = others_of(&function.join("iommu_group/devices"), &address)?;
    if !others.is_empty() {
        return unusable(format!("shares IOMMU group {group} with {}; put it in a slot of its own", others.join(", ")));
    }
    let address = CString::new(address).map_err(|_| FunctionError::Unusable("a PCI address has no NUL".into()))?;
    Ok(Found { address, group, profile, role })
}

/// `0000:01:00.0` from that or from `01:00.0`, in small letters.
fn parse(text: &str) -> Result<String, FunctionError> {
    let bad = || FunctionError::Unusable(format!("{text:?} is no PCI address: they look like 0000:01:00.0"));
    let text_with_domain = match text.matches(':').count() {
        1 => format!("0000:{text}"),
        _ => text.to_owned(),
    };
    let parts: Vec<&str> = text_with_domain.split([':', '.']).collect();
    let [domain, bus, slot, function] = parts[..] else { return Err(bad()) };
    let hex = |part: &str, most: u32| {
        let digits = part.chars().all(|c| c.is_ascii_hexdigit());
        u32::from_str_radix(part, 16).ok().filter(|n| digits && *n <= most).ok_or_else(bad)
    };
    let (domain, bus) = (hex(domain, u32::MAX)?, hex(bus, 0xff)?);
    let (slot, function) = (hex(slot, 0x1f)?, hex(function, 7)?);
    let parsed = format!("{domain:04x}:{bus:02x}:{slot:02x}.{function:x}");
    if text_with_domain.split('.').count() == 2 { Ok(parsed) } else { Err(bad()) }
}

/// The other functions of a group. Bridges above a function do no DMA of their own.
fn others_of(group: &Path, this: &str) -> Result<Vec<String>, FunctionError> {
    let unreadable = |e: std::io::Error| {
        FunctionError::Os(
            "list an IOMMU group",
            e.raw_os_error().map_or(nix::errno::Errno::EIO, nix::errno::Errno::from_raw),
        )
    };
    let mut others = Vec::new();
    for entry in fs::read_dir(group).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_bridge = number(&entry.path().join("class")).is_some_and(|class| class >> 8 == BRIDGE);
        if name != this && !is_bridge {
            others.push(name);
        }
    }
    others.sort();
    Ok(others)
}

/// The number that a file holds as `0x…`.
fn number(path: &Path) -> Option<u32> {
    let text = fs::read_to_string(path).ok()?;
    u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

/// The last name of what a link points to.
fn link_name(path: &Path) -> Option<String> {
    let target: PathBuf = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Address, device id, class, driver, group.
    type Function<'a> = (&'a str, u16, u32, Option<&'a str>, Option<u32>);

    /// A tree of functions, as sysfs has it.
    fn tree(functions: &[Function]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (address, device, class, driver, group) in functions {
            let function = root.path().join("devices").join(address);
            fs::create_dir_all(&function).unwrap();
            fs::write(function.join("vendor"), "0x0b0d\n").unwrap();
            fs::write(function.join("device"), format!("0x{device:04x}\n")).unwrap();
            fs::write(function.join("class"), format!("0x{class:06x}\n")).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../../drivers/{driver}"), function.join("driver")).unwrap();
            }
            if let Some(group) = group {
                let group = root.path().join("groups").join(group.to_string());
                fs::create_dir_all(group.join("devices")).unwrap();
                symlink(&function, group.join("devices").join(address)).unwrap();
                symlink(group, function.join("iommu_group")).unwrap();
            }
        }
        root
    }

    fn refusal(root: &tempfile::TempDir, address: &str) -> String {
        find(&root.path().join("devices"), address, Side::Host).unwrap_err().to_string()
    }

    #[test]
    fn a_function_of_its_own_group_is_found_also_behind_its_bridge() {
        let root = tree(&[
            ("0000:00:02.0", 0x000c, 0x06_0400, Some("pcieport"), Some(7)),
            ("0000:01:00.0", 0x0001, 0x12_0000, Some("vfio-pci"), Some(7)),
            ("0000:02:00.0", 0x0002, 0x12_0000, Some("vfio-pci"), Some(8)),
        ]);
        let devices = root.path().join("devices");
        let found = find(&devices, "01:00.0", Side::Host).unwrap();
        assert_eq!((found.address.to_str(), found.group, found.role), (Ok("0000:01:00.0"), 7, Role::Vm));
        assert_eq!(find(&devices, "0000:02:00.0", Side::Host).unwrap().role, Role::Host);
    }

    #[test]
    fn what_can_not_be_opened_is_refused_in_one_line_that_says_what_to_do() {
        let root = tree(&[
            ("0000:01:00.0", 0x0001, 0x12_0000, Some("vfio-pci"), Some(7)),
            ("0000:01:00.1", 0x0001, 0x12_0000, Some("vfio-pci"), Some(7)),
            ("0000:02:00.0", 0x0001, 0x12_0000, Some("nvme"), Some(8)),
            ("0000:03:00.0", 0x0001, 0x12_0000, None, Some(9)),
            ("0000:04:00.0", 0x0001, 0x12_0000, Some("vfio-pci"), None),
            ("0000:05:00.0", 0x0101, 0x12_0000, Some("vfio-pci"), Some(10)),
            ("0000:06:00.0", 0x1234, 0x12_0000, Some("vfio-pci"), Some(11)),
        ]);
        for (address, says) in [
            ("01:00.0", "PCI 0000:01:00.0 shares IOMMU group 7 with 0000:01:00.1; put it in a slot of its own"),
            ("02:00.0", "is not bound to vfio-pci (driver nvme holds it)"),
            ("03:00.0", "is not bound to vfio-pci (no driver holds it)"),
            ("04:00.0", "has no IOMMU"),
            ("05:00.0", "is the SoC side of a card; this program takes its host side"),
            ("06:00.0", "is 0b0d:1234, no card"),
            ("07:00.0", "isn't there"),
            ("7", "is no PCI address"),
            ("0000:01:20.0", "is no PCI address"),
            ("0000:01:00:0", "is no PCI address"),
            ("0000:+1:00.0", "is no PCI address"),
            ("../../x", "is no PCI address"),
        ] {
            let refused = refusal(&root, address);
            assert!(refused.contains(says) && !refused.contains('\n'), "{address}: {refused}");
        }
    }
}
