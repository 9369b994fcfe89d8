//! Options of few words: `-name`, `-rtc`, `-boot`, `-action`, `-smbios` and their kin.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Properties, Uuid, Wrong, inert};

/// `-name`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Name {
    /// The guest's name.
    pub guest: String,
    /// The process's: it keeps its own.
    #[serde(rename = "process")]
    _process: Option<String>,
}

/// `-rtc base=`: what the clock is set to at the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RtcBase {
    /// The time of day in UTC.
    #[default]
    Utc,
    /// The time of day here.
    LocalTime,
    /// A date: time since 1970.
    Date(Duration),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RtcProperties {
    base: Option<String>,
}

impl RtcBase {
    /// Reads the value of `-rtc`.
    ///
    /// # Errors
    /// It can't be meant.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let RtcProperties { base } = stripped("-rtc", text, Some("base"))?.read()?;
        match base.as_deref() {
            None | Some("utc") => Ok(Self::Utc),
            Some("localtime") => Ok(Self::LocalTime),
            Some(date) => parse_date(date).map(Self::Date).ok_or_else(|| {
                let date = date.escape_default();
                Wrong::new(format!("'{date}': write utc, localtime, or a date from 1970 on as 2026-01-31T12:00:00"))
                    .at("base")
            }),
        }
    }
}

/// `YYYY-MM-DD[THH:MM:SS]`.
fn parse_date(text: &str) -> Option<Duration> {
    let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00"));
    let numbers = |text: &str, separator, lengths: [usize; 3]| -> Option<[u64; 3]> {
        let parts: Vec<&str> = text.split(separator).collect();
        let sound =
            parts.iter().map(|part| part.len()).eq(lengths) && parts.concat().bytes().all(|b| b.is_ascii_digit());
        let parts: Vec<u64> =
            if sound { parts.iter().map_while(|part| part.parse().ok()).collect() } else { Vec::new() };
        parts.try_into().ok()
    };
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let lengths = [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let length = *lengths.get(usize::try_from(month.checked_sub(1)?).ok()?)?;
    if year < 1970 || !(1..=length).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let years: u64 = (1970..year).map(|year| if leap(year) { 366 } else { 365 }).sum();
    let months: u64 = lengths[..month as usize - 1].iter().sum();
    Some(Duration::from_secs(((years + months + day - 1) * 24 + hour) * 3600 + minute * 60 + second))
}

/// `-boot`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct BootOption {
    /// Letters: a floppy, c disk, d CD-ROM, n network.
    pub order: Option<String>,
    /// Whether firmware shows its menu.
    pub menu: bool,
    /// How long it waits there, in ms.
    pub splash_time: Option<u16>,
    /// How long it waits before it tries again, in ms; -1: for ever.
    pub reboot_timeout: Option<i32>,
    /// Whether it gives up behind the last device that has a bootindex.
    pub strict: bool,
}

impl BootOption {
    /// Reads the value of `-boot`.
    ///
    /// # Errors
    /// It can't be meant.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let boot: Self = stripped("-boot", text, Some("order"))?.read()?;
        let order = boot.order.as_deref().unwrap_or_default();
        let sound = order.len() <= 3 && order.chars().all(|c| "acdn".contains(c));
        let letters = order.as_bytes();
        let once = letters.iter().enumerate().all(|(at, letter)| !letters[..at].contains(letter));
        match (sound && once, boot.reboot_timeout) {
            (false, _) => Err(Wrong::new("write up to three of a, c, d, n, each once").at("order")),
            (_, Some(ms)) if !(-1..=0xffff).contains(&ms) => {
                Err(Wrong::new("write -1, or milliseconds up to 65535").at("reboot-timeout"))
            }
            _ => Ok(boot),
        }
    }
}

/// What becomes of a VM that resets, powers off or panics: `-action`, `-no-reboot`, `-no-shutdown` and QMP `set-action`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ActionOption {
    /// QMP `RebootAction`.
    pub reboot: Option<RebootAction>,
    /// QMP `ShutdownAction`.
    pub shutdown: Option<ShutdownAction>,
    /// QMP `PanicAction`.
    pub panic: Option<PanicAction>,
    /// QMP `WatchdogAction`: there is no watchdog.
    watchdog: Option<WatchdogAction>,
}

/// What a reset comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RebootAction {
    /// A reset.
    #[default]
    Reset,
    /// The same as powering off.
    Shutdown,
}

/// What powering off comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownAction {
    /// The VM's end.
    #[default]
    Poweroff,
    /// A VM that doesn't run, until it is reset or ended.
    Pause,
}

/// What the guest's panic comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PanicAction {
    /// Nothing but an event.
    None,
    /// A VM that doesn't run.
    Pause,
    /// The VM's end, as what powering off comes to.
    #[default]
    Shutdown,
    /// The VM's end.
    ExitFailure,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum WatchdogAction {
    Reset,
    Shutdown,
    Poweroff,
    Pause,
    Debug,
    None,
    InjectNmi,
}

/// `-smbios`, of type 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SmbiosSystem {
    /// Who made the machine.
    pub manufacturer: Option<String>,
    /// What it is.
    pub product: Option<String>,
    /// Which version.
    pub version: Option<String>,
    /// Its serial number.
    pub serial: Option<String>,
    /// Its UUID.
    pub uuid: Option<Uuid>,
    /// What it is sold as.
    pub sku: Option<String>,
    /// What kind of machine it is.
    pub family: Option<String>,
}

impl SmbiosSystem {
    /// Reads the value of `-smbios`.
    ///
    /// # Errors
    /// It can't be meant, or is of another type.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let mut properties = Properties::parse(text, None)?;
        match &*properties.take("type")? {
            "1" => properties.read(),
            other => {
                let other = other.escape_default();
                Err(Wrong::new(format!("type {other} is soc-vmm's own to tell: type=1 can be told")).at("type"))
            }
        }
    }
}

/// `-fw_cfg`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FwCfgFile {
    /// Its name.
    pub name: String,
    /// What is in it.
    pub content: FwCfgContent,
}

/// What is in a file of fw_cfg.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FwCfgContent {
    /// These characters.
    Text(String),
    /// What this file has.
    File(PathBuf),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FwCfgProperties {
    name: String,
    string: Option<String>,
    file: Option<PathBuf>,
}

impl FwCfgFile {
    /// Reads the value of `-fw_cfg`.
    ///
    /// # Errors
    /// It can't be meant.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let FwCfgProperties { name, string, file } = Properties::parse(text, Some("name"))?.read()?;
        // Other names are the machine's.
        if !name.starts_with("opt/") || name.len() > 55 || name.chars().any(char::is_control) {
            return Err(Wrong::new("a name begins with opt/ and has at most 55 bytes").at("name"));
        }
        let content = match (string, file) {
            (Some(text), None) => FwCfgContent::Text(text),
            (None, Some(path)) => FwCfgContent::File(path),
            _ => return Err(Wrong::new("it needs one of 'string' and 'file'")),
        };
        Ok(Self { name, content })
    }
}

/// `-add-fd`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddFd {
    /// The descriptor.
    pub fd: i32,
    /// The set that it goes to.
    pub set: i64,
    /// What whoever passed it calls it.
    pub opaque: Option<String>,
}

/// `-drive if=pflash`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlashDrive {
    /// 0: code. 1: variables.
    pub unit: u8,
    /// The image.
    pub file: PathBuf,
    /// It is not written.
    pub read_only: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveProperties {
    format: Option<String>,
    unit: Option<u8>,
    file: PathBuf,
    #[serde(default)]
    readonly: bool,
    #[serde(rename = "id")]
    _id: Option<String>,
}

impl FlashDrive {
    /// Reads the value of `-drive`; one without a unit is the next after `before`.
    ///
    /// # Errors
    /// It can't be meant, or is no flash.
    pub fn parse(text: &str, before: usize) -> Result<Self, Wrong> {
        let mut properties = Properties::parse(text, None)?;
        if !properties.take("if").is_ok_and(|interface| interface == "pflash") {
            let why = "-drive is for flash (if=pflash): give a disk by -blockdev and -device virtio-blk-pci";
            return Err(Wrong::new(why));
        }
        if let Ok(old) = properties.take("read-only") {
            return Err(Wrong::new(format!("write readonly={old}")).at("read-only"));
        }
        let drive: DriveProperties = properties.read()?;
        if drive.format.as_deref().is_some_and(|format| format != "raw") {
            return Err(Wrong::new("flash is raw").at("format"));
        }
        let unit = drive.unit.unwrap_or(before.min(2) as u8);
        if unit > 1 {
            return Err(Wrong::new("there is unit 0, the code, and unit 1, the variables").at("unit"));
        }
        Ok(Self { unit, file: drive.file, read_only: drive.readonly })
    }
}

/// `-mon`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// Its character device.
    pub chardev: String,
    /// `control`: QMP.
    mode: Option<String>,
    /// Its name.
    #[serde(rename = "id")]
    _id: Option<String>,
}

impl Monitor {
    /// A QMP monitor on that character device.
    pub(super) fn on(chardev: String) -> Self {
        Self { chardev, mode: Some("control".to_owned()), _id: None }
    }

    /// Reads the value of `-mon`.
    ///
    /// # Errors
    /// It can't be meant, or is no QMP monitor.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let monitor: Self = stripped("-mon", text, Some("chardev"))?.read()?;
        match monitor.mode.as_deref() {
            Some("control") => Ok(monitor),
            _ => Err(Wrong::new("the human monitor is not there: write mode=control").at("mode")),
        }
    }
}

/// `-audiodev`: none, for which libvirt asks.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Audio {
    driver: String,
    #[serde(rename = "id")]
    _id: String,
}

/// Reads the value of `-audiodev`.
///
/// # Errors
/// It is one.
pub(super) fn audio(text: &str) -> Result<(), Wrong> {
    let audio: Audio = Properties::parse(text, Some("driver"))?.read()?;
    if audio.driver == "none" { Ok(()) } else { Err(Wrong::new("there is no sound: write none").at("driver")) }
}

/// `-outboard`, an option of ours: what QEMU's command line has no words for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Outboard {
    /// The PCIe function, as `run --function` has it.
    pub function: Option<String>,
    /// What to log, as `run --log` has it.
    pub log: Option<String>,
}

/// The properties of an option, less those that change nothing.
pub(super) fn stripped(option: &str, text: &str, implied: Option<&str>) -> Result<Properties, Wrong> {
    let mut properties = Properties::parse(text, implied)?;
    inert::strip(option, &mut properties)?;
    Ok(properties)
}
