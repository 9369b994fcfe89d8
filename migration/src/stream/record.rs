//! The records, and what their payloads are.

use zerocopy::{FromBytes, IntoBytes};

use super::page::{PAGE, Pages, Run, WireRun};

/// Most pages of one record.
pub const MOST_PAGES: u64 = 64;
/// Most runs of one record.
pub(crate) const MOST_RUNS: usize = 1 << 12;
/// Flag of pages that are a frame of zstd.
const COMPRESSED: u32 = 1;
/// Most pages of one record that says where they are, and the bytes that it has for each.
pub(crate) const MOST_PLACED: usize = 1 << 16;
pub(crate) const SUM: usize = 4;
/// Longest sentence.
const MOST_WORDS: usize = 4 << 10;
const RUN: usize = size_of::<WireRun>();

/// What a record is; the number on the wire. Those below 16 go to the destination, those from 16 on to the source, from 32 on both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// [`Record::Description`].
    Description = 1,
    /// [`Record::Pages`].
    Pages = 2,
    /// [`Record::Zeros`].
    Zeros = 3,
    /// [`Record::Device`].
    Device = 4,
    /// [`Record::Guest`].
    Guest = 5,
    /// [`Record::RoundEnds`].
    RoundEnds = 6,
    /// [`Record::LastPage`].
    LastPage = 7,
    /// [`Record::Go`].
    Go = 8,
    /// [`Record::StateEnds`].
    StateEnds = 9,
    /// [`Record::Gone`].
    Gone = 10,
    /// [`Record::Placed`].
    Placed = 11,
    /// [`Record::Ready`].
    Ready = 16,
    /// [`Record::Refused`].
    Refused = 17,
    /// [`Record::Runs`].
    Runs = 18,
    /// [`Record::Wanted`].
    Wanted = 19,
    /// [`Record::Loaded`].
    Loaded = 20,
    /// [`Record::Complete`].
    Complete = 21,
    /// [`Record::Alive`].
    Alive = 32,
    /// [`Record::Missing`].
    Missing = 33,
}

impl Kind {
    const ALL: [Self; 19] = [
        Self::Description,
        Self::Pages,
        Self::Zeros,
        Self::Device,
        Self::Guest,
        Self::RoundEnds,
        Self::LastPage,
        Self::Go,
        Self::StateEnds,
        Self::Gone,
        Self::Placed,
        Self::Ready,
        Self::Refused,
        Self::Runs,
        Self::Wanted,
        Self::Loaded,
        Self::Complete,
        Self::Alive,
        Self::Missing,
    ];

    /// The kind of that number.
    #[must_use]
    pub fn of(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// The longest payload.
    #[must_use]
    pub fn most_bytes(self) -> u32 {
        let bytes = match self {
            Self::Description | Self::Guest => 1 << 20,
            Self::Pages => RUN + (MOST_PAGES * PAGE) as usize,
            Self::Zeros | Self::Wanted | Self::Missing => MOST_RUNS * RUN,
            Self::Device => 16 << 20,
            Self::RoundEnds => 8,
            Self::Placed => RUN + 8 + MOST_PLACED * SUM,
            Self::Refused => MOST_WORDS,
            Self::LastPage | Self::StateEnds | Self::Go | Self::Gone => 0,
            Self::Ready | Self::Loaded | Self::Runs | Self::Complete | Self::Alive => 0,
        };
        bytes as u32
    }
}

/// A record, its bytes borrowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// What the machine is that moves, in JSON: the first record.
    Description(&'a [u8]),
    /// Content of pages.
    Pages(Pages<'a>),
    /// Pages of zeros.
    Zeros(Vec<Run>),
    /// The state of a device, in JSON.
    Device {
        /// The device, as the description names it.
        name: &'a str,
        /// The version of its state.
        version: u32,
        /// The state.
        state: &'a [u8],
    },
    /// What KVM keeps of a vCPU, or of the VM: the records of `api-channel`.
    Guest {
        /// Which vCPU; none: the VM.
        vcpu: Option<u32>,
        /// The records.
        records: &'a [u8],
    },
    /// A round over memory has ended: for whoever watches. How many pages are dirty again.
    RoundEnds(u64),
    /// No page follows on this connection.
    LastPage,
    /// The last of the state was sent: the destination may load it.
    StateEnds,
    /// The guest is the destination's from here on: whoever sent this never runs it again, unless it is told to.
    Go,
    /// The source knows that the guest runs at the destination.
    Gone,
    /// Of a file whose pages have places: where some of them are.
    Placed {
        /// Which.
        run: Run,
        /// Where the first begins, in bytes from the file's preamble; the others follow it.
        at: u64,
        /// A CRC-32 (IEEE 802.3) of each.
        sums: &'a [u8],
    },
    /// The destination can run what was described, and has room for it.
    Ready,
    /// It can't, and why; or it could not go on.
    Refused(&'a str),
    /// The guest runs at the destination: the source's is to be destroyed.
    Runs,
    /// All of it is there and loaded: the guest could start.
    Loaded,
    /// No page is missing any more, of a guest that was started without some.
    Complete,
    /// Nothing to say, but still here.
    Alive,
    /// Pages that come after the guest has started, whatever came of them before; from the destination: pages that have to be sent again.
    Missing(Vec<Run>),
    /// Pages that the guest waits for, after it was started without them.
    Wanted(Vec<Run>),
}

impl<'a> Record<'a> {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Description(_) => Kind::Description,
            Self::Pages(_) => Kind::Pages,
            Self::Zeros(_) => Kind::Zeros,
            Self::Device { .. } => Kind::Device,
            Self::Guest { .. } => Kind::Guest,
            Self::RoundEnds(_) => Kind::RoundEnds,
            Self::LastPage => Kind::LastPage,
            Self::StateEnds => Kind::StateEnds,
            Self::Go => Kind::Go,
            Self::Gone => Kind::Gone,
            Self::Placed { .. } => Kind::Placed,
            Self::Ready => Kind::Ready,
            Self::Refused(_) => Kind::Refused,
            Self::Runs => Kind::Runs,
            Self::Wanted(_) => Kind::Wanted,
            Self::Loaded => Kind::Loaded,
            Self::Complete => Kind::Complete,
            Self::Alive => Kind::Alive,
            Self::Missing(_) => Kind::Missing,
        }
    }

    /// Appends what stands before its borrowed bytes to `head`; those bytes.
    pub(super) fn encode(&self, head: &mut Vec<u8>) -> &'a [u8] {
        match self {
            Self::Description(bytes) => bytes,
            Self::Pages(Pages { run, compressed, bytes }) => {
                let flags = if *compressed { COMPRESSED } else { 0 };
                head.extend_from_slice(WireRun::new(*run, flags).as_bytes());
                bytes
            }
            Self::Zeros(runs) | Self::Wanted(runs) | Self::Missing(runs) => {
                for run in runs {
                    head.extend_from_slice(WireRun::new(*run, 0).as_bytes());
                }
                &[]
            }
            Self::Device { name, version, state } => {
                head.extend_from_slice(&version.to_le_bytes());
                head.extend_from_slice(&(name.len() as u32).to_le_bytes());
                head.extend_from_slice(name.as_bytes());
                state
            }
            Self::Guest { vcpu, records } => {
                head.extend_from_slice(&vcpu.unwrap_or(u32::MAX).to_le_bytes());
                head.extend_from_slice(&[0; 4]);
                records
            }
            Self::RoundEnds(dirty) => {
                head.extend_from_slice(&dirty.to_le_bytes());
                &[]
            }
            Self::Placed { run, at, sums } => {
                head.extend_from_slice(WireRun::new(*run, 0).as_bytes());
                head.extend_from_slice(&at.to_le_bytes());
                sums
            }
            Self::Refused(why) => why.as_bytes(),
            Self::LastPage | Self::StateEnds | Self::Go | Self::Gone => &[],
            Self::Ready | Self::Loaded | Self::Runs | Self::Complete | Self::Alive => &[],
        }
    }

    /// The record of a kind whose payload that is; or what is wrong with it.
    pub(super) fn decode(kind: Kind, payload: &'a [u8]) -> Result<Self, &'static str> {
        Ok(match kind {
            Kind::Description => Self::Description(payload),
            Kind::Pages => Self::Pages(pages(payload)?),
            Kind::Zeros => Self::Zeros(runs(payload)?),
            Kind::Wanted => Self::Wanted(runs(payload)?),
            Kind::Missing => Self::Missing(runs(payload)?),
            Kind::Device => {
                let short = "its name is not all there";
                let (version, rest) = number(payload).ok_or(short)?;
                let (len, rest) = number(rest).ok_or(short)?;
                let (name, state) = rest.split_at_checked(len as usize).ok_or(short)?;
                let name = str::from_utf8(name).map_err(|_| "its name is no text")?;
                Self::Device { name, version, state }
            }
            Kind::Guest => {
                let (vcpu, rest) = number(payload).ok_or("it is of no vCPU")?;
                let (0, records) = number(rest).ok_or("it is of no vCPU")? else {
                    return Err("a reserved field is not 0");
                };
                Self::Guest { vcpu: (vcpu != u32::MAX).then_some(vcpu), records }
            }
            Kind::RoundEnds => {
                Self::RoundEnds(u64::from_le_bytes(payload.try_into().map_err(|_| "it is no number of pages")?))
            }
            Kind::Placed => placed(payload)?,
            Kind::Refused => Self::Refused(str::from_utf8(payload).map_err(|_| "its reason is no text")?),
            // The length of these is bounded to none.
            Kind::LastPage => Self::LastPage,
            Kind::StateEnds => Self::StateEnds,
            Kind::Go => Self::Go,
            Kind::Gone => Self::Gone,
            Kind::Ready => Self::Ready,
            Kind::Runs => Self::Runs,
            Kind::Loaded => Self::Loaded,
            Kind::Complete => Self::Complete,
            Kind::Alive => Self::Alive,
        })
    }
}

fn pages(payload: &[u8]) -> Result<Pages<'_>, &'static str> {
    let (wire, bytes) = WireRun::read_from_prefix(payload).map_err(|_| "it names no pages")?;
    let (run, flags) = wire.read().ok_or("it names no pages")?;
    if run.pages > MOST_PAGES || run.parts(MOST_PAGES).count() != 1 {
        return Err("its pages go by several connections");
    }
    let whole = (run.pages * PAGE) as usize;
    match flags {
        0 if bytes.len() == whole => Ok(Pages { run, compressed: false, bytes }),
        COMPRESSED if (1..whole).contains(&bytes.len()) => Ok(Pages { run, compressed: true, bytes }),
        0 | COMPRESSED => Err("its bytes are not those of its pages"),
        _ => Err("it is compressed in an unknown way"),
    }
}

fn placed(payload: &[u8]) -> Result<Record<'_>, &'static str> {
    let (wire, rest) = WireRun::read_from_prefix(payload).map_err(|_| "it names no pages")?;
    let (run, 0) = wire.read().ok_or("it names no pages")? else {
        return Err("a reserved field is not 0");
    };
    let (at, sums) = rest.split_first_chunk().ok_or("it says not where its pages are")?;
    if run.pages.checked_mul(SUM as u64) != Some(sums.len() as u64) {
        return Err("its checksums are not those of its pages");
    }
    Ok(Record::Placed { run, at: u64::from_le_bytes(*at), sums })
}

fn runs(payload: &[u8]) -> Result<Vec<Run>, &'static str> {
    if payload.is_empty() || !payload.len().is_multiple_of(RUN) {
        return Err("it is no list of pages");
    }
    let run = |bytes: &[u8]| match WireRun::read_from_bytes(bytes).ok()?.read()? {
        (run, 0) => Some(run),
        _ => None,
    };
    payload.chunks_exact(RUN).map(run).collect::<Option<_>>().ok_or("it names no pages")
}

fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*number), rest))
}
