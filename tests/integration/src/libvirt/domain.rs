//! Domains as Debian 12's virt-install 4.1 writes them by `--graphics none --controller usb,model=none`.

use std::fmt::Write as _;

use testbed::libvirt::Libvirt;

/// A domain.
#[derive(Clone, Debug)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its memory in MiB.
    pub memory: u32,
    /// How many virtual processors it begins with, and how many it may have.
    pub vcpus: (u32, u32),
    /// The element of its processor. That is the host's unless it is said.
    pub cpu: String,
    /// Elements of its features, beside ACPI and APIC.
    pub features: String,
    /// What it starts by.
    pub boot: Boot,
    /// Disks and interfaces, each in XML of its own.
    pub devices: Vec<String>,
    /// Elements that virt-install writes where it is told to: `<on_reboot>destroy</on_reboot>`.
    pub more: String,
}

/// What a domain starts by.
#[derive(Clone, Debug)]
pub enum Boot {
    /// SeaBIOS and its first disk.
    Disk,
    /// A kernel of the host's.
    Kernel {
        /// The kernel's file, as libvirtd sees it.
        kernel: String,
        /// Its initramfs.
        initrd: Option<String>,
        /// Its command line.
        cmdline: Option<String>,
    },
}

impl Domain {
    /// A domain with one processor and 64 MiB, and with no disk or interface yet.
    #[must_use]
    pub fn new(name: &str, boot: Boot) -> Self {
        Self {
            name: name.to_owned(),
            memory: 64,
            vcpus: (1, 1),
            cpu: "<cpu mode=\"host-passthrough\"/>".to_owned(),
            features: String::new(),
            boot,
            devices: Vec::new(),
            more: String::new(),
        }
    }

    /// Its XML.
    #[must_use]
    pub fn xml(&self) -> String {
        let kib = u64::from(self.memory) << 10;
        let (name, (online, most)) = (&self.name, self.vcpus);
        let current = if online < most { format!(" current=\"{online}\"") } else { String::new() };
        let boot = match &self.boot {
            Boot::Disk => "<boot dev=\"hd\"/>".to_owned(),
            Boot::Kernel { kernel, initrd, cmdline } => {
                let element = |name: &str, text: &Option<String>| {
                    text.as_ref().map(|text| format!("<{name}>{text}</{name}>")).unwrap_or_default()
                };
                let (initrd, cmdline) = (element("initrd", initrd), element("cmdline", cmdline));
                format!("<kernel>{kernel}</kernel>{initrd}{cmdline}")
            }
        };
        let mut xml = format!(
            r#"<domain type="kvm">
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory>{kib}</memory>
  <currentMemory>{kib}</currentMemory>
  <vcpu{current}>{most}</vcpu>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    {boot}
  </os>
  <features>
    <acpi/>
    <apic/>
    {features}
  </features>
  {cpu}
  <clock offset="utc">
    <timer name="rtc" tickpolicy="catchup"/>
    <timer name="pit" tickpolicy="delay"/>
    <timer name="hpet" present="no"/>
  </clock>
  {more}
  <pm>
    <suspend-to-mem enabled="no"/>
    <suspend-to-disk enabled="no"/>
  </pm>
  <devices>
    <emulator>{emulator}</emulator>
"#,
            features = self.features,
            cpu = self.cpu,
            more = self.more,
            uuid = uuid(name),
            emulator = Libvirt::EMULATOR,
        );
        for device in &self.devices {
            let _ = writeln!(xml, "    {device}");
        }
        xml.push_str(r#"    <controller type="usb" model="none"/>"#);
        xml.push_str("\n    <controller type=\"pci\" model=\"pcie-root\"/>\n");
        xml.push_str(&"    <controller type=\"pci\" model=\"pcie-root-port\"/>\n".repeat(ROOT_PORTS));
        xml.push_str(
            r#"    <console type="pty"/>
    <channel type="unix">
      <source mode="bind"/>
      <target type="virtio" name="org.qemu.guest_agent.0"/>
    </channel>
    <memballoon model="virtio"/>
    <rng model="virtio">
      <backend model="random">/dev/urandom</backend>
    </rng>
  </devices>
</domain>
"#,
        );
        xml
    }
}

/// The same for the same name, so that a domain can be defined anew.
fn uuid(name: &str) -> String {
    // FNV-1a, of 64 bits.
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{:08x}-{:04x}-4000-8000-{:012x}", hash >> 32, hash >> 16 & 0xffff, hash & 0xffff_ffff_ffff)
}

/// Room for devices that come later.
const ROOT_PORTS: usize = 14;

/// A virtio disk: an image of format `raw` or `qcow2`, the guest's `vdX`.
#[must_use]
pub fn disk(file: &str, format: &str, target: &str) -> String {
    format!(
        "<disk type=\"file\" device=\"disk\"><driver name=\"qemu\" type=\"{format}\" discard=\"unmap\"/>\
         <source file=\"{file}\"/><target dev=\"{target}\" bus=\"virtio\"/></disk>"
    )
}

/// A CD-ROM drive at the SATA controller, with a medium or without.
#[must_use]
pub fn cdrom(file: Option<&str>, target: &str) -> String {
    let source = file.map(|file| format!("<source file=\"{file}\"/>")).unwrap_or_default();
    format!(
        "<disk type=\"file\" device=\"cdrom\"><driver name=\"qemu\" type=\"raw\"/>{source}\
         <target dev=\"{target}\" bus=\"sata\"/><readonly/></disk>"
    )
}

/// An interface at a TAP that somebody else has made.
#[must_use]
pub fn tap(name: &str, mac: &str) -> String {
    format!(
        "<interface type=\"ethernet\"><target dev=\"{name}\" managed=\"no\"/><mac address=\"{mac}\"/>\
         <model type=\"virtio\"/></interface>"
    )
}

/// An interface to whatever this machine reaches. Debian's libvirtd refuses `<backend type="passt"/>`, though its schema has it.
#[must_use]
pub fn user(mac: &str) -> String {
    format!("<interface type=\"user\"><mac address=\"{mac}\"/><model type=\"virtio\"/></interface>")
}
