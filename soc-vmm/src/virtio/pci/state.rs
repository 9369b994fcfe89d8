//! A virtio function's state on its way to another process: what its registers say, and how far its queues are. What its engine has is a
//! state of its own, under a name that says which kind of device it is.
//!
//! Nothing is taken of a queue while it moves, so its position is all there is to know of it; chains that were taken and not given back are
//! the engine's to carry. An interrupt may have been on its way: whoever goes on raises all of them, since one too many is harmless.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::super::registers::Registers;
use super::super::session::{Control, Session};
use super::super::{Lease, RingPosition};
use super::{VirtioPci, missing};
use crate::pci::{ConfigState, MsixState};
use crate::persist::{Fact, Moves, RestoreError, StateError, States};

const NAME: &str = "virtio-pci";
const VERSION: u32 = 1;

/// Saved state of a [`VirtioPci`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TransportState {
    config: ConfigState,
    msix: MsixState,
    registers: Registers,
    /// ISR status (virtio 1.2 §4.1.4.5).
    isr: u8,
    /// The device's configuration, and its generation.
    device: Vec<u8>,
    generation: u8,
    /// What of it the driver has written.
    words: Vec<u32>,
    /// None before DRIVER_OK.
    session: Option<SessionState>,
}

/// What there is from DRIVER_OK on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SessionState {
    /// The device waits for a reset (§2.1.2), and the queues are what they are.
    needs_reset: bool,
    /// The position of each queue that the driver has enabled.
    queues: Vec<Option<RingPosition>>,
}

impl VirtioPci {
    fn transport(&self, session: Option<&Session>) -> TransportState {
        let (device, generation) = self.device.save();
        let position = |index: usize| Some(session?.queues.get(index)?.as_ref()?.position());
        let of_session = |control: &Arc<Control>| SessionState {
            needs_reset: control.needs_reset(),
            queues: (0..self.kicks.len()).map(position).collect(),
        };
        TransportState {
            config: self.config.save(),
            msix: self.msix.save(),
            registers: self.registers.clone(),
            isr: self.interrupts.status(),
            device,
            generation,
            words: self.words.iter().map(|word| word.get()).collect(),
            session: self.session.as_ref().map(of_session),
        }
    }

    /// The session that goes on at the positions of `state`, and the side that ends it: none of one that needs a reset.
    fn resume(&self, state: &TransportState) -> Result<(Option<Arc<Control>>, Option<Session>), RestoreError> {
        let TransportState { registers, session, .. } = state;
        let Some(SessionState { needs_reset, queues }) = session else { return Ok((None, None)) };
        if !registers.is_running() {
            return Err(refused("its queues are in use before its driver says that they are"));
        }
        let control = Control::new(Lease::new(self.memory.clone()));
        let control = Arc::new(control.map_err(|_| refused("this process can have no more descriptors"))?);
        if *needs_reset {
            control.ask_for_reset();
            return Ok((Some(control), None));
        }
        let is_enabled = registers.queues.iter().map(|queue| queue.enabled);
        if queues.len() != registers.queues.len() || !queues.iter().map(Option::is_some).eq(is_enabled) {
            return Err(refused("a queue in use has no position, or one that isn't has"));
        }
        let position = |index: usize| queues.get(index).copied().flatten().unwrap_or_default();
        let session = self.open(registers, &control, position);
        let session = session.map_err(|_| refused("it has a queue that is not where a queue can be"))?;
        Ok((Some(control), Some(session)))
    }
}

impl Moves for VirtioPci {
    fn halt(&mut self) {
        self.worker.halt(self.session.as_deref());
    }

    fn is_halted(&mut self) -> bool {
        self.worker.is_halted()
    }

    fn go_on(&mut self) {
        if self.session.is_some() {
            let enabled = self.registers.queues.iter().enumerate().filter(|(_, queue)| queue.enabled);
            enabled.for_each(|(index, _)| self.interrupts.queue(index));
            self.interrupts.config();
        }
        self.worker.go_on(self.session.as_deref());
    }

    /// # Panics
    /// It isn't halted, and more than its name is wanted: a mistake of ours.
    fn save_into(&self, at: &str, states: &mut States) {
        if states.are_names() {
            let (name, version) = self.state;
            states.put(NAME, at, VERSION, &());
            states.put(name, at, version, &());
            states.tell(name, at, "queues", Fact::Is(self.limits.queues.len() as u64));
            if self.kind == VIRTIO_ID_BLOCK {
                let mut sectors = [0; 8];
                self.device.read(0, &mut sectors);
                states.tell(name, at, "sectors", Fact::AtLeast(u64::from_le_bytes(sectors)));
            }
            return;
        }
        let saved = self.worker.look(|engine, session| {
            states.put(NAME, at, VERSION, &self.transport(session));
            engine.save_into(at, states, session);
        });
        saved.expect("a device is halted when it is saved");
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        let state: TransportState = states.take(NAME, at, VERSION)?;
        let TransportState { config, msix, registers, isr, device, generation, words, .. } = &state;
        registers.check(&self.limits).map_err(refused)?;
        if let Some(why) = missing::of(self.kind, registers.agreed() & !self.limits.offered) {
            return Err(refused(why).into());
        }
        let (control, session) = self.resume(&state)?;
        if words.len() != self.words.len() || !self.device.restore(device, *generation) {
            return Err(refused("its configuration has another length").into());
        }
        if !self.config.restore(config) || !self.msix.restore(msix) {
            return Err(refused("its configuration space is another device's").into());
        }
        let settings = &self.device;
        let loaded = self.worker.load(session, |engine, session| engine.load(at, states, settings, session));
        loaded.ok_or_else(|| refused("the device is at work"))??;
        self.words.iter().zip(words).for_each(|(word, value)| word.set(*value));
        let vectors = registers.queues.iter().map(|queue| queue.vector).chain([registers.config_vector]);
        vectors.enumerate().for_each(|(index, vector)| self.interrupts.set_route(index, vector));
        self.msix.configure(&self.config);
        self.update_pin();
        self.interrupts.restore(*isr, control.is_some());
        self.registers = registers.clone();
        if let Some(before) = std::mem::replace(&mut self.session, control) {
            before.end();
        }
        Ok(())
    }

    fn blocker(&self) -> Option<String> {
        self.blocker.clone()
    }
}

fn refused(what: &'static str) -> RestoreError {
    RestoreError::new(NAME, what)
}
