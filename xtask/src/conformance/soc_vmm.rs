//! An entry as soc-vmm is told it.

use super::entries::Entry;

/// QEMU's, which tests count on.
const MEMORY: &str = "128M";

/// What soc-vmm doesn't carry, by a word of QEMU's parameters.
const MISSING: [(&str, &str); 1] = [("vmport=on", "VMware's port")];

/// Why soc-vmm can't run an entry by what it is, if it can't.
pub(crate) fn missing(entry: &Entry) -> Option<&'static str> {
    match entry.file.as_str() {
        "vmx.flat" => return Some("VMX"),
        "svm.flat" | "svm_npt.flat" => return Some("SVM"),
        _ => {}
    }
    let has = |word: &str| entry.qemu.iter().any(|parameter| parameter.contains(word));
    MISSING.iter().find(|(word, _)| has(word)).map(|(_, what)| *what)
}

/// The arguments of soc-vmm for `entry`, whose image is `image`.
pub(crate) fn arguments(entry: &Entry, image: &str) -> Vec<String> {
    let mut memory = MEMORY.to_owned();
    let mut cpu = None;
    let mut devices = Vec::new();
    let mut parameters = entry.qemu.iter();
    while let Some(parameter) = parameters.next() {
        // What else stands there chooses an accelerator, or switches something off that isn't there or does no harm.
        match parameter.as_str() {
            "-m" => memory = parameters.next().cloned().unwrap_or(memory),
            "-cpu" => cpu = parameters.next().map(|model| model_of(model)),
            "-device" => devices.extend(parameters.next().and_then(|device| device_of(device))),
            _ => {}
        }
    }
    let cpus = entry.cpus.to_string();
    // As QEMU does it, the image's own name comes first.
    let line = format!("{} {}", entry.file, entry.arguments);
    let mut arguments = vec!["run", "--kernel", image, "--cmdline", line.trim(), "--cpus", &cpus, "--memory", &memory];
    arguments.push("--debug-exit");
    if let Some(cpu) = &cpu {
        arguments.extend(["--cpu", cpu]);
    }
    arguments.extend(devices.into_iter().flatten());
    arguments.into_iter().map(str::to_owned).collect()
}

/// A device of QEMU's by the option that gives the machine the same. Its properties choose what is so anyway.
fn device_of(device: &str) -> Option<[&'static str; 2]> {
    match device.split(',').next() {
        Some("intel-iommu") => Some(["--iommu", "intel"]),
        Some("edu") => Some(["--test-device", "edu"]),
        Some("hyperv-testdev") => Some(["--test-device", "hyperv"]),
        _ => None,
    }
}

/// The host's own processor, less what the entry takes away, and with Hyper-V's interfaces where it wants them. QEMU warns of what a named model has and the host hasn't, and goes on; soc-vmm
/// refuses such a model, so that no guest runs on less than it was promised. What an entry adds, the host's has if it can.
fn model_of(cpu: &str) -> String {
    let kept = cpu.split(',').skip(1).filter(|word| word.starts_with('-') || *word == "hv_passthrough");
    std::iter::once("host").chain(kept).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(file: &str, qemu: &[&str]) -> Entry {
        let qemu = qemu.iter().map(|&word| word.to_owned()).collect();
        Entry { file: file.to_owned(), arguments: "b c".to_owned(), qemu, ..Entry::new("a") }
    }

    #[test]
    fn parameters_are_translated() {
        let told = arguments(
            &entry("a.flat", &["-cpu", "max,host-phys-bits,+x2apic,-smap,vendor=GenuineIntel", "-m", "2048"]),
            "/a",
        );
        let line = "run --kernel /a --cmdline a.flat b c --cpus 1 --memory 2048 --debug-exit --cpu host,-smap";
        assert_eq!(told.join(" "), line);
        let told = arguments(&entry("a.flat", &["-cpu", "host,hv_passthrough", "-device", "hyperv-testdev"]), "/a");
        let told = told.join(" ");
        assert!(told.ends_with("--debug-exit --cpu host,hv_passthrough --test-device hyperv"), "{told}");
    }

    #[test]
    fn devices_are_translated() {
        let told = arguments(
            &entry("a.flat", &["-M", "q35,kernel-irqchip=split", "-device", "intel-iommu,eim=off", "-device", "edu"]),
            "/a",
        );
        let line =
            "run --kernel /a --cmdline a.flat b c --cpus 1 --memory 128M --debug-exit --iommu intel --test-device edu";
        assert_eq!(told.join(" "), line);
    }

    #[test]
    fn what_is_not_carried_is_named() {
        assert_eq!(missing(&entry("vmx.flat", &[])), Some("VMX"));
        assert_eq!(missing(&entry("a.flat", &["-machine", "vmport=on"])), Some("VMware's port"));
        assert_eq!(missing(&entry("a.flat", &["-cpu", "max"])), None);
    }
}
