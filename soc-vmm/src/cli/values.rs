//! The values of options: how each is written, and nothing that can't be meant.

use std::path::PathBuf;
use std::str::FromStr;

/// A value that an option can't have: what is wrong, and what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

impl ValueError {
    pub(crate) fn new(why: String) -> Self {
        Self(why)
    }
}

pub(super) fn wrong<T>(why: impl Into<String>) -> Result<T, ValueError> {
    Err(ValueError(why.into()))
}

/// `--dirty-ring`: entries of each vCPU's dirty ring; 0: none, and dirty pages are logged by bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyRing(pub u32);

impl FromStr for DirtyRing {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse() {
            Ok(0) => Ok(Self(0)),
            Ok(entries @ 1024..=65536) if u32::is_power_of_two(entries) => Ok(Self(entries)),
            _ => wrong(format!(
                "'{}' is no size of a dirty ring: a power of two from 1024 to 65536, or 0",
                text.escape_default()
            )),
        }
    }
}

/// `--memory`: how much RAM, of which pages, where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes: more than 0, whole pages.
    pub size: u64,
    /// Huge pages on the host, of this size.
    pub hugepages: Option<HugePages>,
    /// NUMA node of the host.
    pub node: Option<u16>,
    /// All of it is taken before the guest starts, and not as it is touched. Huge pages and what a function pins are, anyway.
    pub prealloc: bool,
}

impl Default for Memory {
    /// 512 MiB.
    fn default() -> Self {
        Self { size: 512 << 20, hugepages: None, node: None, prealloc: false }
    }
}

/// Sizes of huge pages on x86 hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HugePages {
    /// Bytes of one page.
    pub fn size(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

impl FromStr for Memory {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let (size, options) = s.split_once(',').map_or((s, None), |(size, options)| (size, Some(options)));
        let mut memory = Self { size: parse_size(size)?, ..Self::default() };
        let mut prealloc = None;
        for option in options.into_iter().flat_map(|options| options.split(',')) {
            match option.split_once('=') {
                Some(("hugepages", "2M")) if memory.hugepages.is_none() => memory.hugepages = Some(HugePages::Size2M),
                Some(("hugepages", "1G")) if memory.hugepages.is_none() => memory.hugepages = Some(HugePages::Size1G),
                Some(("hugepages", other)) if memory.hugepages.is_none() => {
                    return wrong(format!("hugepages={other}: huge pages are 2M or 1G"));
                }
                Some(("node", node)) if memory.node.is_none() => match node.parse() {
                    Ok(node) => memory.node = Some(node),
                    Err(_) => return wrong(format!("node={node}: a NUMA node is a number")),
                },
                Some(("prealloc", "on")) if prealloc.is_none() => prealloc = Some(true),
                Some(("prealloc", "off")) if prealloc.is_none() => prealloc = Some(false),
                _ => {
                    let all = "SIZE[,hugepages=2M|1G][,node=N][,prealloc=on|off]";
                    return wrong(format!("'{option}': write {all}, each once"));
                }
            }
        }
        memory.prealloc = prealloc.unwrap_or_default();
        let page = memory.hugepages.map_or(4 << 10, HugePages::size);
        if !memory.size.is_multiple_of(page) {
            return wrong(format!("{} bytes are not whole pages of {page} bytes", memory.size));
        }
        Ok(memory)
    }
}

/// A size of something, as `resize` takes it: in bytes, not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DiskSize(pub(super) u64);

impl FromStr for DiskSize {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        match parse_scaled(s) {
            Some(bytes) if (1..=i64::MAX as u64).contains(&bytes) => Ok(Self(bytes)),
            _ => wrong(format!("'{s}': a size is a number of MiB, or one with K, M, G or T, and not 0")),
        }
    }
}

/// A number and its unit: MiB if there is none. None: it is no number, or more than 64 bits.
fn parse_scaled(s: &str) -> Option<u64> {
    let units = [(b'K', 10), (b'M', 20), (b'G', 30), (b'T', 40)];
    let last = s.as_bytes().last().map(u8::to_ascii_uppercase);
    let unit = units.iter().find(|(unit, _)| Some(*unit) == last);
    let (digits, shift) = unit.map_or((s, 20), |(_, shift)| (&s[..s.len() - 1], *shift));
    let digits = Some(digits).filter(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
    digits?.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// How much may pass in a time, more than 0: `10`, or `10K`, `10M`, `10G` for thousands, as networks and disks count.
pub(super) fn limit(name: &str, s: &str) -> Result<u64, ValueError> {
    /// More is no limit.
    const MOST: u64 = 1 << 50;
    let units = [(b'K', 1_000), (b'M', 1_000_000), (b'G', 1_000_000_000)];
    let last = s.as_bytes().last().map(u8::to_ascii_uppercase);
    let unit = units.iter().find(|(unit, _)| Some(*unit) == last);
    let (digits, unit) = unit.map_or((s, 1), |(_, unit)| (&s[..s.len() - 1], *unit));
    let digits = Some(digits).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let number = digits.and_then(|digits| digits.parse::<u64>().ok()?.checked_mul(unit));
    match number.filter(|number| (1..=MOST).contains(number)) {
        Some(number) => Ok(number),
        None => wrong(format!("{name}={s}: write a number from 1 to {MOST}, as 1000, 10K, 10M or 1G")),
    }
}

/// `512`, `512M`: MiB; `K`, `G` likewise.
pub(super) fn parse_size(s: &str) -> Result<u64, ValueError> {
    let (digits, shift) = match s.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&s[..s.len() - 1], 10),
        Some(b'M') => (&s[..s.len() - 1], 20),
        Some(b'G') => (&s[..s.len() - 1], 30),
        _ => (s, 20),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return wrong("a size is a number of MiB, or one with K, M or G");
    }
    match digits.parse::<u64>().ok().filter(|n| n.leading_zeros() > shift) {
        None => wrong("no host has that much memory"),
        Some(0) => wrong("a VM needs memory"),
        Some(n) => Ok(n << shift),
    }
}

/// `--cpu-affinity`: vCPUs and the host CPUs they stay on, each vCPU once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuAffinity(pub Vec<(u16, u16)>);

impl FromStr for CpuAffinity {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let mut pairs: Vec<(u16, u16)> = Vec::new();
        for pair in s.split(',') {
            let numbers = pair.split_once('=').and_then(|(vcpu, cpu)| Some((vcpu.parse().ok()?, cpu.parse().ok()?)));
            let Some((vcpu, cpu)) = numbers else {
                return wrong(format!("'{pair}': write VCPU=HOSTCPU[,…], as 0=4,1=5"));
            };
            if pairs.iter().any(|(earlier, _)| *earlier == vcpu) {
                return wrong(format!("vCPU {vcpu} is there twice"));
            }
            pairs.push((vcpu, cpu));
        }
        Ok(Self(pairs))
    }
}

/// `--serial`: what is at the other end of COM1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialSpec {
    /// This process's terminal, or its standard input and output.
    Stdio,
    /// Nothing.
    Null,
    /// A new pseudo-terminal.
    Pty,
    /// A file that is written.
    File(PathBuf),
    /// A UNIX socket that is listened on.
    Unix(PathBuf),
}

impl FromStr for SerialSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        match (s, s.split_once(':')) {
            ("stdio", _) => Ok(Self::Stdio),
            ("null", _) => Ok(Self::Null),
            ("pty", _) => Ok(Self::Pty),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            (_, Some(("unix", path))) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => wrong("write stdio, null, pty, file:FILE or unix:SOCKET"),
        }
    }
}

/// `--debugcon`: where the debug console at port 0x402 writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DebugconSpec {
    /// Standard output.
    Stdio,
    /// A file.
    File(PathBuf),
}

impl FromStr for DebugconSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        match (s, s.split_once(':')) {
            ("stdio", _) => Ok(Self::Stdio),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => wrong("write stdio or file:FILE"),
        }
    }
}

/// `--qmp`: the path of a UNIX socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QmpSocket(pub(super) PathBuf);

impl FromStr for QmpSocket {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        match s.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self(path.into())),
            _ => wrong("write unix:SOCKET"),
        }
    }
}

/// `--function`: the PCIe function a VM gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FunctionSpec {
    /// None: a shim of its own on this machine.
    Local,
    /// A shim on this machine that listens there.
    Unix(PathBuf),
    /// The SoC side of an emulated card, by vfio-user.
    Card(PathBuf),
    /// A function of this SoC, through VFIO.
    Pci(Bdf),
    /// The first free one of the configuration.
    Pool,
}

impl FromStr for FunctionSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        match (s, s.split_once(':')) {
            ("local", _) => Ok(Self::Local),
            ("pool", _) => Ok(Self::Pool),
            (_, Some(("unix", path))) if !path.is_empty() => Ok(Self::Unix(path.into())),
            (_, Some(("card", path))) if !path.is_empty() => Ok(Self::Card(path.into())),
            (_, Some(("pci", address))) => address.parse().map(Self::Pci),
            _ => wrong("write local, unix:SOCKET, card:SOCKET, pci:BDF or pool"),
        }
    }
}

impl std::fmt::Display for FunctionSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Card(path) => write!(f, "card:{}", path.display()),
            Self::Pci(bdf) => write!(f, "pci:{bdf}"),
            Self::Pool => f.write_str("pool"),
        }
    }
}

/// A PCI address, as Linux names devices: `[DDDD:]BB:DD.F`, hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bdf {
    /// Domain (segment), 0 unless given; VMD controllers have 32-bit ones.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 0–31.
    pub device: u8,
    /// Function, 0–7.
    pub function: u8,
}

impl FromStr for Bdf {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        parse_bdf(s).ok_or_else(|| ValueError(format!("'{s}' is no PCI address; write one as 0000:01:00.0")))
    }
}

fn parse_bdf(s: &str) -> Option<Bdf> {
    let hex = |digits: &str, most: usize| {
        let good = (1..=most).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        good.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
    };
    let (rest, function) = s.split_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.split_once(':').unwrap_or(("0", rest));
    Some(Bdf {
        domain: hex(domain, 8)?,
        bus: hex(bus, 2)? as u8,
        device: hex(device, 2).filter(|d| *d < 32)? as u8,
        function: hex(function, 1).filter(|f| *f < 8)? as u8,
    })
}

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn memory(s: &str) -> Option<(u64, Option<u64>, Option<u16>)> {
        s.parse::<Memory>().ok().map(|m| (m.size, m.hugepages.map(HugePages::size), m.node))
    }

    #[test]
    fn memory_in_every_notation() {
        assert_eq!(memory("512"), Some((512 << 20, None, None)));
        assert_eq!(memory("64K"), Some((64 << 10, None, None)));
        assert_eq!(memory("2g"), Some((2 << 30, None, None)));
        assert_eq!(memory("512M,node=1,hugepages=2M"), Some((512 << 20, Some(2 << 20), Some(1))));
        assert_eq!(memory("4G,hugepages=1G"), Some((4 << 30, Some(1 << 30), None)));
        for bad in [
            "",
            "0",
            "0M",
            "M",
            "-1",
            "+1",
            "1.5G",
            "1T",
            "0x10",
            "512MB",
            "6K",
            "3M,hugepages=2M",
            "512M,hugepages=1G",
            "512M,",
            "512M,hugepages=4K",
            "512M,node=",
            "512M,node=0,node=1",
            "512M,size=1",
            "17179869184G",
            "18446744073709551615",
        ] {
            assert_eq!(memory(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn memory_that_is_taken_at_once() {
        let prealloc = |s: &str| s.parse::<Memory>().ok().map(|memory| memory.prealloc);
        assert_eq!(prealloc("1G"), Some(false));
        assert_eq!(prealloc("1G,prealloc=on,node=0"), Some(true));
        assert_eq!(prealloc("1G,prealloc=off"), Some(false));
        for bad in ["1G,prealloc", "1G,prealloc=yes", "1G,prealloc=on,prealloc=on", "1G,prealloc=off,prealloc=on"] {
            assert_eq!(prealloc(bad), None, "{bad}");
        }
    }

    #[test]
    fn pci_addresses() {
        for (text, shown) in
            [("01:00.0", "0000:01:00.0"), ("0001:ff:1f.7", "0001:ff:1f.7"), ("10000:0:2.0", "10000:00:02.0")]
        {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "1",
            "01:00",
            "01:20.0",
            "01:00.8",
            "01:00.00",
            "001:00.0",
            "0:0:0:0.0",
            "g1:00.0",
            "+1:00.0",
            "123456789:0:0.0",
        ] {
            assert!(bad.parse::<Bdf>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn affinity_names_each_vcpu_once() {
        assert_eq!("0=4,1=5".parse(), Ok(CpuAffinity(vec![(0, 4), (1, 5)])));
        for bad in ["", "0", "0=", "0=1,", "0=1,0=2", "a=1", "0=70000"] {
            assert!(bad.parse::<CpuAffinity>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn specs_need_their_paths() {
        for bad in ["", "unix", "unix:", "card:", "pci:", "tcp:x", "Local"] {
            assert!(bad.parse::<FunctionSpec>().is_err(), "{bad:?}");
        }
        for bad in ["", "file:", "unix:", "tty", "stdio:"] {
            assert!(bad.parse::<SerialSpec>().is_err(), "{bad:?}");
        }
        for bad in ["", "null", "file:", "unix:x"] {
            assert!(bad.parse::<DebugconSpec>().is_err(), "{bad:?}");
        }
        assert_eq!("unix:a:b".parse(), Ok(SerialSpec::Unix("a:b".into())));
        assert!("/tmp/x".parse::<QmpSocket>().is_err());
    }

    proptest! {
        #[test]
        fn functions_read_back_as_they_are_shown(path in "[a-z/:.]{1,12}", domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let bdf = Bdf { domain, bus, device, function };
            for spec in [FunctionSpec::Local, FunctionSpec::Pool, FunctionSpec::Pci(bdf),
                         FunctionSpec::Unix(path.clone().into()), FunctionSpec::Card(path.into())] {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }

        #[test]
        fn any_text_is_a_value_or_an_error(text in ".{0,24}") {
            if let Ok(memory) = text.parse::<Memory>() {
                prop_assert!(memory.size >= 4096 && memory.size.is_multiple_of(4096));
            }
            let _ = (text.parse::<CpuAffinity>(), text.parse::<Bdf>(), text.parse::<SerialSpec>(), text.parse::<FunctionSpec>());
        }
    }
}
