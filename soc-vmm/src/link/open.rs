//! Finding the host behind a function: header lines, region table, windows.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api_channel::{Client, ClientWindows};
use pcie_function::header::{FEATURES, HeaderError, HostHeader, Role, SocHeader, VERSION, epoch};
use pcie_function::regions::{self, Region, Spaces, TableError, Type};
use pcie_function::{BusError, BusMemory, Doorbell, SocFunction, Windowed};

use super::bell::Bell;
use super::channel::ChannelEnd;

/// How long a host may take to answer the header before the function counts as unserved.
const PATIENCE: Duration = Duration::from_secs(30);
/// After so long the user is told what is waited for.
const SOON: Duration = Duration::from_secs(2);

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No host header appeared.
    #[error("nobody serves the function: no host-kvm-shim offered it within {} s; start host-kvm-shim on the host", PATIENCE.as_secs())]
    NoHost,
    /// The host's header can't be used.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The host's region table can't be used.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The function has another role.
    #[error("the function has the role {found}, this needs the role {wanted}; name another function")]
    Role {
        /// What it is for.
        found: &'static str,
        /// What it should be for.
        wanted: &'static str,
    },
    /// The function no longer carries.
    #[error("{error}{}", advice(*error))]
    Bus {
        /// How it failed.
        error: BusError,
    },
    /// The doorbell can't be watched.
    #[error("can't set up the connection")]
    Io(#[from] std::io::Error),
    /// The state file can't be made.
    #[error("can't make the VM's state file {}", .0.display())]
    StateFile(PathBuf, #[source] std::io::Error),
    /// The state file can't be mapped.
    #[error("can't map the VM's state file")]
    State(#[source] pcie_function::FunctionError),
}

/// What a user can do about it.
fn advice(error: BusError) -> &'static str {
    match error {
        BusError::Dma => ": the host's memory can't be reached; is the function's host-kvm-shim running?",
        BusError::Gone | BusError::Stale => "",
    }
}

impl From<BusError> for LinkError {
    fn from(error: BusError) -> Self {
        Self::Bus { error }
    }
}

impl LinkError {
    /// Whether the host went away.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::Bus { error: BusError::Gone })
    }
}

/// A negotiated function.
#[derive(Debug)]
pub struct Link<F: SocFunction> {
    /// The function.
    pub function: Arc<F>,
    /// Its regions, checked.
    pub regions: Vec<Region>,
    /// The SoC's lines in the inbox.
    pub soc_lines: F::Remote,
}

impl<F: SocFunction> Link<F> {
    /// Waits for the host's header, answers it, and opens the channel.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn open(function: Arc<F>, wanted: Role) -> Result<(Self, ChannelEnd<F>), LinkError> {
        let card = function.card_memory();
        let header = Self::wait(&function, &card).await?;
        if header.role != wanted {
            let name = |role| if role == Role::Vm { "vm" } else { "host" };
            return Err(LinkError::Role { found: name(header.role), wanted: name(wanted) });
        }
        let spaces =
            Spaces { card: card.len() as u64, inbox: header.inbox_len.into(), outbox: header.outbox_len.into() };
        let regions = regions::load(&card, header.table, header.regions, &spaces)?;
        let find = |kind, stride, count| regions::find(&regions, kind, stride, count);
        let cut = |kind, stride, count| -> Result<F::Card, LinkError> {
            let region = find(kind, stride, count)?;
            Ok(regions::window(&card, &region).ok_or(TableError::Missing(kind))?)
        };
        let remote = |kind, stride, count| -> Result<F::Remote, LinkError> {
            let region = find(kind, stride, count)?;
            let base = if region.space == regions::Space::Outbox { header.outbox } else { header.inbox };
            Ok(function.remote(base + region.offset, region.len as usize))
        };
        let soc_lines = remote(Type::SOC_LINES, 64, 16)?;
        let windows = ClientWindows {
            host_lines: cut(Type::HOST_LINES, 64, 16)?,
            replies: cut(Type::REPLIES, 64, 1024)?,
            events: cut(Type::EVENTS, 64, 64)?,
            soc_lines: soc_lines.clone(),
            requests: remote(Type::REQUESTS, 64, 1024)?,
            bulk: remote(Type::BULK, 4096, 1)?,
        };
        let nonce = nonce();
        // First: it takes away what an earlier connection left.
        let client = Client::new(windows, epoch(header.nonce, nonce));
        SocHeader { version: VERSION, features: header.features & FEATURES, host_nonce: header.nonce, nonce }
            .store(&soc_lines);
        soc_lines.flush()?;
        function.raise(CHANNEL_VECTOR);
        let end = ChannelEnd::new(function.clone(), client)?;
        Ok((Self { function, regions, soc_lines }, end))
    }

    /// The host's header, once there is one.
    async fn wait(function: &Arc<F>, card: &F::Card) -> Result<HostHeader, LinkError> {
        let bell = Bell::new(function.doorbell(Doorbell::Channel))?;
        let began = tokio::time::Instant::now();
        let deadline = began + PATIENCE;
        let mut told = false;
        loop {
            if !told && began.elapsed() > SOON {
                tracing::warn!("no host-kvm-shim offers the function yet: waiting up to {} s", PATIENCE.as_secs());
                told = true;
            }
            function.renew()?;
            if let Some(header) = HostHeader::load(card)? {
                return Ok(header);
            }
            // A doorbell rung before this side listened is lost on some cards: look again now and then.
            let look_again = tokio::time::Instant::now() + Duration::from_millis(100);
            if tokio::time::timeout_at(look_again.min(deadline), bell.rung()).await.is_err()
                && tokio::time::Instant::now() >= deadline
            {
                return Err(LinkError::NoHost);
            }
        }
    }

    /// The card memory of one lane region, cut by lane.
    ///
    /// # Errors
    /// The region is missing or has too few lanes.
    pub fn lanes(&self, kind: Type, stride: usize, count: u32) -> Result<Vec<F::Card>, LinkError> {
        let region = regions::find(&self.regions, kind, stride, count)?;
        let whole = regions::window(&self.function.card_memory(), &region).ok_or(TableError::Missing(kind))?;
        let lane = |i: u32| whole.cut(i as usize * region.stride as usize, stride);
        (0..count).map(|i| lane(i).ok_or(LinkError::Table(TableError::Missing(kind)))).collect()
    }
}

/// The vector that wakes the host's channel.
pub(super) const CHANNEL_VECTOR: u32 = 0;

/// A number that no earlier connection had.
fn nonce() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // The standard library's keys come from the system's random source.
    RandomState::new().hash_one(std::process::id()) | 1
}
