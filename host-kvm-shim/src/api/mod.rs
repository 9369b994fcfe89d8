//! One connection of the API channel: the API thread's loop while a SoC is there.

mod calls;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use api_channel::call::Call;
use api_channel::event::Event;
use api_channel::message::ChannelError;
use api_channel::{Asked, Server, Status};
use pcie_function::header::SocHeader;
use pcie_function::{HostFunction, State};

use crate::bootstrap::Offer;
use crate::error::{Refusal, ServeError};
use crate::host::Host;
use crate::poller::{Poller, Wake};
use crate::serve::{Level, Options};
use crate::vm::Machine;

/// A connection, and the VM that was created through it.
pub(crate) struct Session<'a, F: HostFunction> {
    host: &'a Host,
    options: &'a Options,
    offer: &'a mut Offer<F>,
    poller: &'a Poller,
    server: Server<F::Window, F::Window>,
    soc_nonce: u64,
    /// Why no VM can be created: another one is held.
    held: Option<String>,
    machine: Option<Machine<F>>,
    pausing: Option<Pausing>,
    /// Events that found no room yet.
    backlog: VecDeque<Event>,
    /// Whether something was sent since the channel's doorbell rang.
    sent: bool,
    /// Until when a bulk is looked after without being rung, and how long to wait next.
    bulk_wait: Option<Duration>,
    pulse: Pulse,
    /// Whether calls came since the last tick, and since memory was given back.
    busy: [bool; 2],
    /// More calls wait, perhaps.
    more: bool,
    /// The shim ends once the VM is gone.
    shutting_down: bool,
    /// A VM was created and destroyed.
    ended_one: bool,
}

/// Why a connection ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The SoC asked the shim to end.
    Shutdown,
    /// The one VM is gone.
    Once,
    /// The function no longer carries.
    Lost(String),
    /// Another SoC, or the same after a restart, took over.
    Restarted(SocHeader),
    /// The SoC broke a rule.
    Broken(String),
}

/// A pause that waits for vCPUs to finish their exits.
struct Pausing {
    asked: Asked,
    vcpu: u32,
    deadline: Option<Instant>,
    /// The vCPUs that ran before.
    ran: Vec<u32>,
}

/// The SoC's heartbeat as it was last seen to change.
struct Pulse {
    beat: u64,
    changed: Instant,
    /// Whether it was reported silent.
    silent: bool,
    /// The vCPUs that ran when the VM was paused for it.
    paused: Option<Vec<u32>>,
}

/// A heartbeat that stands still so long is lost.
const SILENCE: Duration = Duration::from_secs(10);
/// A heartbeat that stands still so long makes the function be looked at.
const SUSPICION: Duration = Duration::from_secs(3);
/// Calls that are served before everything else has its turn: a SoC that never stops calling holds nothing up.
const A_TURN: usize = 64;
/// Events that wait for room in the ring; log records beyond are dropped.
const BACKLOG: usize = 256;

impl<'a, F: HostFunction + 'static> Session<'a, F> {
    pub(crate) fn new(
        host: &'a Host,
        options: &'a Options,
        offer: &'a mut Offer<F>,
        poller: &'a Poller,
        server: Server<F::Window, F::Window>,
        soc_nonce: u64,
        held: Option<String>,
    ) -> Self {
        let pulse = Pulse { beat: server.soc_beat(), changed: Instant::now(), silent: false, paused: None };
        Self {
            host,
            options,
            offer,
            poller,
            server,
            soc_nonce,
            held,
            machine: None,
            pausing: None,
            backlog: VecDeque::new(),
            sent: false,
            bulk_wait: None,
            pulse,
            busy: [true; 2],
            more: false,
            shutting_down: false,
            ended_one: false,
        }
    }

    /// The VM that the connection leaves behind; whether one ended in its course.
    pub(crate) fn into_machine(self) -> (Option<Machine<F>>, bool) {
        (self.machine, self.ended_one)
    }

    /// Serves until the connection ends; `tick` is called once a second.
    pub(crate) fn run(&mut self, mut tick: impl FnMut()) -> Result<End, ServeError> {
        self.log(Level::Info, "connected");
        loop {
            match self.round(&mut tick) {
                Ok(()) => {}
                Err(Stop::End(End::Broken(why))) => return Ok(self.broken(why)),
                Err(Stop::End(end)) => return Ok(end),
                Err(Stop::Fatal(error)) => return Err(error),
            }
        }
    }

    /// How a connection whose rules were broken ends. A SoC that begins anew takes its old words away before its header tells of it:
    /// what looks broken in between is not.
    fn broken(&self, why: String) -> End {
        const SOON: Duration = Duration::from_millis(2);
        std::thread::sleep(SOON);
        match self.offer.answer(self.soc_nonce) {
            Ok(Some(soc)) => End::Restarted(soc),
            _ => End::Broken(why),
        }
    }

    fn round(&mut self, tick: &mut impl FnMut()) -> Result<(), Stop> {
        self.take_calls()?;
        self.finish_pause()?;
        self.flush_events()?;
        if std::mem::take(&mut self.sent) {
            self.offer.ring();
        }
        if self.machine.is_none() && self.shutting_down {
            return Err(Stop::End(End::Shutdown));
        }
        for wake in self.poller.wait(self.patience())? {
            match wake {
                Wake::Channel => {
                    if let Ok(Some(soc)) = self.offer.answer(self.soc_nonce) {
                        return Err(Stop::End(End::Restarted(soc)));
                    }
                }
                Wake::Lost => {
                    if let Err(bus) = self.offer.function.check() {
                        return Err(Stop::End(End::Lost(bus.to_string())));
                    }
                }
                Wake::Notice => {
                    if let Some((vcpu, error)) = self.offer.notices.take_broken() {
                        return Err(Stop::End(End::Broken(format!("the lane of vCPU {vcpu}: {error}"))));
                    }
                }
                Wake::Tick => {
                    tick();
                    self.server.beat();
                    self.rest();
                    self.feel_pulse();
                    self.look_at_function()?;
                }
                Wake::Eoi(gsi) => self.report(Event::Eoi { gsi }),
            }
        }
        Ok(())
    }

    /// After a second without a call: gives back the memory that the calls before it took.
    fn rest(&mut self) {
        if self.busy == [false, true] {
            self.host.program().forget();
            self.busy[1] = false;
        }
        self.busy[0] = false;
    }

    /// How long nothing need be looked at without being woken.
    fn patience(&self) -> Option<Duration> {
        if self.more {
            return Some(Duration::ZERO);
        }
        let deadline = self.pausing.as_ref().and_then(|pausing| pausing.deadline);
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        [self.bulk_wait, left].into_iter().flatten().min()
    }

    fn take_calls(&mut self) -> Result<(), Stop> {
        self.more = true;
        for _ in 0..A_TURN {
            let Some((asked, call)) = self.server.poll()? else {
                self.more = false;
                break;
            };
            self.bulk_wait = None;
            self.sent = true;
            self.soc_lives();
            self.busy = [true; 2];
            if self.options.log == Level::Debug {
                self.log(Level::Debug, &format!("call {:#05x}", call.opcode()));
            }
            if let Call::Pause(vcpu) = call {
                self.begin_pause(asked, vcpu)?;
                continue;
            }
            match self.execute(call) {
                Ok(reply) => {
                    self.server.reply(asked, &reply.payload, &reply.bulk)?;
                    if !reply.bulk.is_empty() {
                        // The SoC need not ring when it has fetched the bulk; what waits behind it is looked for.
                        self.bulk_wait = Some(Duration::from_millis(1));
                    }
                }
                Err(Refusal { status, why }) => {
                    self.log(Level::Debug, &format!("refused: {why}"));
                    self.server.refuse(asked, status, &why)?;
                }
            }
            if self.options.once && self.machine.is_none() && self.ended_one {
                self.offer.ring();
                return Err(Stop::End(End::Once));
            }
        }
        self.bulk_wait = self.bulk_wait.filter(|wait| *wait < Duration::from_secs(1)).map(|wait| wait * 2);
        Ok(())
    }
}

/// Leaves the loop.
enum Stop {
    End(End),
    Fatal(ServeError),
}

impl From<ChannelError> for Stop {
    fn from(error: ChannelError) -> Self {
        Self::End(End::Broken(error.to_string()))
    }
}

impl From<ServeError> for Stop {
    fn from(error: ServeError) -> Self {
        Self::Fatal(error)
    }
}

impl<F: HostFunction + 'static> Session<'_, F> {
    /// Tells vCPUs to pause; [`Session::finish_pause`] answers.
    fn begin_pause(&mut self, asked: Asked, vcpu: u32) -> Result<(), Stop> {
        let ran = match (&self.machine, &self.pausing) {
            (None, _) => Err(Refusal::state("there is no VM")),
            (Some(_), Some(_)) => Err(Refusal::state("another pause is under way")),
            (Some(machine), None) => machine.pause(vcpu),
        };
        match ran {
            Ok(ran) => {
                let limit = Duration::from_millis(asked.deadline_ms.into());
                let deadline = (!limit.is_zero()).then(|| Instant::now() + limit);
                self.pausing = Some(Pausing { asked, vcpu, deadline, ran });
                Ok(())
            }
            Err(Refusal { status, why }) => Ok(self.server.refuse(asked, status, &why)?),
        }
    }

    /// Answers a pause once its vCPUs are out, their exits finished; or, after its deadline, lets them run on.
    fn finish_pause(&mut self) -> Result<(), Stop> {
        let (Some(pausing), Some(machine)) = (&self.pausing, &self.machine) else { return Ok(()) };
        match machine.unpaused(pausing.vcpu) {
            None => self.server.reply(pausing.asked, &[], &[])?,
            Some(vcpu) if pausing.deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                for &vcpu in &pausing.ran {
                    let _ = machine.run(vcpu);
                }
                let why = format!("vCPU {vcpu} still waits for the answer to its exit");
                self.server.refuse(pausing.asked, Status::LATE, &why)?;
            }
            Some(_) => return Ok(()),
        }
        self.sent = true;
        self.pausing = None;
        Ok(())
    }

    /// Suspends and reports when the SoC's heartbeat stands still. Nothing is destroyed: the SoC may starve, or be stopped.
    fn feel_pulse(&mut self) {
        let beat = self.server.soc_beat();
        if beat != self.pulse.beat {
            self.pulse.beat = beat;
            self.soc_lives();
            return;
        }
        let silent = self.pulse.changed.elapsed();
        if silent < SILENCE {
            return;
        }
        if !self.pulse.silent {
            self.pulse.silent = true;
            if self.offer.state == State::Running {
                self.offer.go(State::Quiesced);
            }
            self.log(Level::Warn, "the SoC's heartbeat is silent");
        }
        if silent >= SILENCE.saturating_add(self.options.lease)
            && self.pulse.paused.is_none()
            && let Some(machine) = &self.machine
        {
            self.pulse.paused = Some(machine.pause(api_channel::call::VCPU_ALL).unwrap_or_default());
            self.log(Level::Error, "the lease is over: the VM is paused (soc-lost)");
        }
    }

    /// A SoC that has been silent for a while may be one that can't be reached: not every loss of a link is told. This load goes
    /// across the bus, so it is made only then.
    fn look_at_function(&self) -> Result<(), Stop> {
        if self.pulse.changed.elapsed() < SUSPICION {
            return Ok(());
        }
        self.offer.function.check().map_err(|bus| Stop::End(End::Lost(bus.to_string())))
    }

    /// The SoC has shown itself: what was suspended because it did not goes on.
    fn soc_lives(&mut self) {
        self.pulse.changed = Instant::now();
        if !std::mem::take(&mut self.pulse.silent) {
            return;
        }
        if self.offer.state == State::Quiesced {
            self.offer.go(State::Running);
        }
        if let (Some(paused), Some(machine)) = (self.pulse.paused.take(), &self.machine) {
            for vcpu in paused {
                let _ = machine.run(vcpu);
            }
        }
        self.log(Level::Warn, "the SoC's heartbeat is back");
    }

    /// Logs to the SoC.
    fn log(&mut self, level: Level, text: &str) {
        if level <= self.options.log {
            self.report(Event::Log { level: level as u8, text: text.to_owned() });
        }
    }

    /// Queues an event. An EOI that still waits says it all; log records give way when the SoC doesn't read.
    fn report(&mut self, event: Event) {
        let dropped = match event {
            Event::Log { .. } => self.backlog.len() >= BACKLOG,
            Event::Eoi { .. } | Event::Wanted(_) => self.backlog.contains(&event),
        };
        if !dropped {
            self.backlog.push_back(event);
        }
    }

    fn flush_events(&mut self) -> Result<(), Stop> {
        while let Some(event) = self.backlog.front() {
            match self.server.event(event) {
                Ok(()) => {
                    self.backlog.pop_front();
                    self.sent = true;
                }
                Err(ChannelError::Full) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.tell_wanted()
    }

    /// Tells of the pages that somebody waits for, as many as there is room for.
    fn tell_wanted(&mut self) -> Result<(), Stop> {
        let Self { machine: Some(machine), server, sent, .. } = self else { return Ok(()) };
        let mut broken = None;
        machine.tell_wanted(|run| match server.event(&Event::Wanted(run)) {
            Ok(()) => {
                *sent = true;
                true
            }
            Err(ChannelError::Full) => false,
            Err(error) => {
                broken = Some(error);
                false
            }
        });
        broken.map_or(Ok(()), |error| Err(error.into()))
    }
}
