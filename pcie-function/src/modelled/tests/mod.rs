//! Both ends of a local function, with a modelled link between them.

mod crossings;
mod order;
mod threads;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::clock::Clock;
use super::{Crossings, Latencies, Link, ModelledHost, ModelledSoc, ModelledWindow};
use crate::local::{LocalHost, LocalRemote, LocalSoc};
use crate::{HostFunction, Iova, SocFunction, Window};

/// Bytes of mailbox.
const INBOX: usize = 4096;

const fn ns(n: u64) -> Duration {
    Duration::from_nanos(n)
}

/// Time that passes when it is told to, and when somebody waits for it.
#[derive(Clone, Default)]
struct Hands(Arc<AtomicU64>);

impl Hands {
    fn advance(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }
}

impl Clock for Hands {
    fn now(&self) -> Duration {
        ns(self.0.load(Ordering::Relaxed))
    }

    fn wait_until(&self, moment: Duration) {
        self.0.fetch_max(moment.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Both ends, the windows that they use, and the memory behind them.
struct Ends {
    host: ModelledHost<LocalHost>,
    soc: ModelledSoc<LocalSoc>,
    host_crossings: Arc<Crossings>,
    soc_crossings: Arc<Crossings>,
    /// Card memory as the host uses it.
    bar: ModelledWindow<Window>,
    /// Card memory as the SoC uses it.
    card: ModelledWindow<Window>,
    /// What stands in card memory.
    card_itself: Window,
    iova: Iova,
    /// Host memory as the host uses it.
    inbox: ModelledWindow<Window>,
    /// Host memory as the SoC uses it.
    remote: ModelledWindow<LocalRemote>,
    /// What stands in host memory.
    inbox_itself: LocalRemote,
}

impl Ends {
    fn on(link: &Link) -> Self {
        let (ours, theirs) = sockets();
        let host = std::thread::spawn(|| LocalHost::new(ours).unwrap());
        let soc = LocalSoc::new(theirs).unwrap();
        let [host_crossings, soc_crossings] = [(); 2].map(|()| Arc::<Crossings>::default());
        let mut host = ModelledHost::across(host.join().unwrap(), host_crossings.clone(), link);
        let soc = ModelledSoc::across(soc, soc_crossings.clone(), link);
        let (iova, inbox) = host.map_mailbox(INBOX, true).unwrap();
        Self {
            bar: host.card_memory(),
            card: soc.card_memory(),
            card_itself: host.inner.card_memory(),
            iova,
            inbox,
            remote: soc.remote(iova, INBOX),
            inbox_itself: soc.inner.remote(iova, INBOX),
            host,
            soc,
            host_crossings,
            soc_crossings,
        }
    }

    /// Ends whose crossings take so long by a clock that only moves by itself where somebody waits.
    fn by_hand(latencies: Latencies) -> (Self, Hands) {
        let hands = Hands::default();
        let link = Link::with_clock(latencies, Box::new(hands.clone()));
        (Self::on(&link), hands)
    }
}

fn sockets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// How often an eventfd was signalled since this was asked last.
fn signals(event: BorrowedFd<'_>) -> u64 {
    let mut count = [0; 8];
    nix::unistd::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}
