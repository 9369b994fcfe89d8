//! A function's whole life at the shim: offered, connected, lost, offered again; and the VM that outlives its SoC for a lease.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pcie_function::header::{Role, SocHeader};
use pcie_function::{HostFunction, State};

use crate::api::{End, Session};
use crate::bootstrap::Offer;
use crate::error::ServeError;
use crate::host::Host;
use crate::poller::{Poller, Wake};
use crate::say::say;
use crate::vm::{Machine, Notices};

/// How a shim behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long a VM is held after its SoC was lost, then it is paused; 0: it is destroyed at once.
    pub lease: Duration,
    /// Whether a VM outlives the function that it was made on: the SoC may come again by another one, as by a socket.
    pub outlives_function: bool,
    /// Stop serving after one VM.
    pub once: bool,
    /// What is logged.
    pub log: Level,
    /// What the function is for; only [`Role::Vm`] runs VMs.
    pub role: Role,
}

/// Log levels; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What ends a VM or a connection.
    Error = 1,
    /// What an operator should look at.
    Warn = 2,
    /// What happens a few times in a VM's life.
    Info = 3,
    /// Every call.
    Debug = 4,
}

/// Why [`Shim::serve`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The SoC asked for it.
    Shutdown,
    /// One VM was served, as [`Options::once`] asks.
    Once,
    /// The function no longer carries: why.
    Lost(String),
}

/// The shim: KVM opened, the host looked at, perhaps a VM held for a lost SoC.
pub struct Shim {
    host: Host,
    options: Options,
    held: Option<Held>,
    /// A VM was created and is gone.
    ended_vm: bool,
}

/// A VM whose SoC was lost. It is freed with the shim.
struct Held {
    vm: Box<dyn Suspend>,
    /// The VM as a sentence names it.
    title: String,
    since: Instant,
    /// When it is paused; `None` once it is.
    until: Option<Instant>,
}

/// A VM of any function, as far as a held one is looked at.
trait Suspend {
    /// Takes its vCPUs out of the guest; they may still wait for the SoC.
    fn suspend(&self);
}

impl<F: HostFunction + 'static> Suspend for Machine<F> {
    fn suspend(&self) {
        let _ = self.pause(api_channel::call::VCPU_ALL);
    }
}

impl Held {
    /// Pauses the VM if its lease is over; says when to look again.
    fn tick(&mut self) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Some(left);
        }
        self.vm.suspend();
        self.until = None;
        say(format_args!("the lease is over: {} is paused (soc-lost)", self.title));
        None
    }
}

impl Shim {
    /// Opens KVM.
    ///
    /// # Errors
    /// The host can't run VMs; what to do.
    pub fn open(options: Options) -> Result<Self, ServeError> {
        Ok(Self { host: Host::open()?, options, held: None, ended_vm: false })
    }

    /// Confines this process for good: no privileges, no files, no network, no exec. Everything that must be opened is open by now:
    /// the function, or the socket that local ones come by.
    ///
    /// # Errors
    /// The kernel lacks seccomp.
    pub fn confine(&mut self) -> Result<(), ServeError> {
        self.host.confine()
    }

    /// Whether a VM is held for a lost SoC.
    pub fn holds_vm(&self) -> bool {
        self.held.is_some()
    }

    /// Whether a VM was created that is gone by now.
    pub fn has_ended_vm(&self) -> bool {
        self.ended_vm
    }

    /// Holds the VM until this process is ended: runs it until its lease is over, then keeps it paused.
    pub fn hold(mut self) -> ! {
        loop {
            match self.held.as_mut().and_then(Held::tick) {
                Some(left) => std::thread::sleep(left),
                None => std::thread::park(),
            }
        }
    }

    /// Waits until `fd` can be read, and lets a held VM's lease run meanwhile.
    ///
    /// # Errors
    /// Polling failed.
    pub fn wait_for(&mut self, fd: BorrowedFd<'_>) -> Result<(), ServeError> {
        loop {
            let left = self.held.as_mut().and_then(Held::tick);
            let timeout =
                left.map_or(PollTimeout::NONE, |d| u16::try_from(d.as_millis() + 1).unwrap_or(u16::MAX).into());
            match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(ServeError::Os("wait for a connection", errno)),
            }
        }
    }

    /// Serves a function until it is lost, or the SoC asks to end. A VM whose SoC was lost is held as the lease says, and refuses
    /// another one to be created until the shim ends.
    ///
    /// # Errors
    /// The function can't be used, or the host fails.
    pub fn serve<F: HostFunction + 'static>(&mut self, function: F) -> Result<Ended, ServeError> {
        let mut offer = Offer::new(function, self.options.role)?;
        let poller = Poller::new(&offer)?;
        offer.offer()?;
        let mut answered = None;
        loop {
            let soc = match answered.take() {
                Some(soc) => soc,
                None => match self.wait_for_soc(&offer, &poller)? {
                    Ok(soc) => soc,
                    Err(why) => return Ok(Ended::Lost(why)),
                },
            };
            let (end, machine) = self.connect(&mut offer, &poller, &soc)?;
            if let Some(machine) = machine {
                self.orphan(&mut offer, machine, &end);
            }
            if let End::Broken(why) = &end {
                say(format_args!("connection ended: {why}"));
                if let Err(bus) = offer.function.check() {
                    return Ok(Ended::Lost(bus.to_string()));
                }
            }
            match end {
                End::Shutdown => {
                    offer.withdraw();
                    return Ok(Ended::Shutdown);
                }
                End::Lost(why) => return Ok(Ended::Lost(why)),
                _ if self.options.once && self.ended_vm => {
                    offer.withdraw();
                    return Ok(Ended::Once);
                }
                End::Restarted(soc) => {
                    offer.restart();
                    answered = Some(soc);
                }
                End::Broken(_) | End::Once => offer.offer()?,
            }
        }
    }

    /// Serves one connection; gives the VM that it leaves behind.
    fn connect<F: HostFunction + 'static>(
        &mut self,
        offer: &mut Offer<F>,
        poller: &Poller,
        soc: &SocHeader,
    ) -> Result<(End, Option<Machine<F>>), ServeError> {
        let Some(server) = offer.open(soc) else {
            return Ok((End::Broken("card memory has no channel".into()), None));
        };
        let held = self.held.as_ref().map(|held| held.describe());
        let mut session = Session::new(&self.host, &self.options, offer, poller, server, soc.nonce, held);
        let end = session.run(|| {
            if let Some(held) = &mut self.held {
                held.tick();
            }
        })?;
        let (machine, ended_one) = session.into_machine();
        self.ended_vm |= ended_one;
        Ok((end, machine))
    }

    /// The SoC of a VM is gone: holds the VM, or ends it.
    fn orphan<F: HostFunction + 'static>(&mut self, offer: &mut Offer<F>, machine: Machine<F>, end: &End) {
        let nobody_comes = match end {
            End::Lost(why) if !self.options.outlives_function => {
                // Said now: the kernel may take a minute to close a function that was removed.
                say(format_args!("{why}: {} ends with it", machine.title()));
                true
            }
            _ => false,
        };
        if nobody_comes || self.options.lease.is_zero() || machine.is_bare() {
            machine.destroy(offer);
            offer.go(State::Negotiated);
            self.ended_vm = true;
            return;
        }
        if offer.state == State::Running {
            offer.go(State::Quiesced);
        }
        // What a held VM's vCPUs have to say is no reason to end another SoC's connection.
        if let Ok(notices) = Notices::new() {
            offer.notices = Arc::new(notices);
        }
        let now = Instant::now();
        let (title, until) = (machine.title(), now.checked_add(self.options.lease));
        say(format_args!("the soc-vmm of {title} is lost: held for {} s", self.options.lease.as_secs()));
        self.held = Some(Held { vm: Box::new(machine), title, since: now, until });
    }

    fn wait_for_soc<F: HostFunction>(
        &mut self,
        offer: &Offer<F>,
        poller: &Poller,
    ) -> Result<Result<SocHeader, String>, ServeError> {
        loop {
            match offer.answer(0) {
                Ok(Some(soc)) => return Ok(Ok(soc)),
                Ok(None) => {}
                Err(error) => say(format_args!("the SoC's answer is refused: {error}")),
            }
            for wake in poller.wait(None)? {
                // Not every loss of a link is told. Nobody waits for the load that it takes to see one.
                if matches!(wake, Wake::Lost | Wake::Tick)
                    && let Err(bus) = offer.function.check()
                {
                    return Ok(Err(bus.to_string()));
                }
            }
            if let Some(held) = &mut self.held {
                held.tick();
            }
        }
    }
}

impl Held {
    /// What a SoC that wants to create a VM is told.
    fn describe(&self) -> String {
        let ago = self.since.elapsed().as_secs();
        let title = &self.title;
        format!(
            "{title} is held here since its soc-vmm was lost {ago} s ago; restart this function's host-kvm-shim to free it"
        )
    }
}
