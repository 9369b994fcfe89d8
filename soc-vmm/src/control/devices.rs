//! What devices tell monitors.
//!
//! Much of it a guest can bring about as often as it likes, and a monitor that falls behind is dropped. So of one kind of event of one device
//! monitors hear at once, then once a [`PERIOD`], and then the latest. Only an error that stops the VM is told of at once always: it is why the VM
//! stops, there is one each time, and the VM goes on when somebody says so.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::broadcast::WeakSender;

use super::event::{Event, EventKind, IoAction, IoOperation};
use crate::virtio::balloon::BalloonEvents;
use crate::virtio::block::{DiskError, DiskErrorListener, ErrorAction};
use crate::virtio::console::PortEvents;

/// As QEMU has it.
const PERIOD: Duration = Duration::from_secs(1);

/// Tells monitors of what devices meet.
#[derive(Clone)]
pub(super) struct DeviceEvents {
    events: WeakSender<Event>,
    /// By event and device: what monitors were not told yet. What is in here was told of within the last period.
    held: Arc<Mutex<HashMap<Key, Option<Event>>>>,
    runtime: Handle,
}

/// An event's name, and the device's.
type Key = (&'static str, String);

impl DeviceEvents {
    /// Tells by `events`.
    ///
    /// # Panics
    /// Outside of a runtime, which keeps the time.
    pub(super) fn new(events: WeakSender<Event>) -> Self {
        Self { events, held: Arc::default(), runtime: Handle::current() }
    }

    fn tell(&self, name: &'static str, device: &str, kind: EventKind) {
        let event = Event::now(kind);
        let key = (name, device.to_owned());
        match self.held.lock().unwrap_or_else(PoisonError::into_inner).entry(key.clone()) {
            Entry::Occupied(mut held) => {
                held.insert(Some(event));
                return;
            }
            Entry::Vacant(place) => drop(place.insert(None)),
        }
        self.send(event);
        self.runtime.spawn(self.clone().go_on(key));
    }

    /// Tells what was held back, until a period was silent.
    async fn go_on(self, key: Key) {
        loop {
            tokio::time::sleep(PERIOD).await;
            let event = {
                let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                match held.get_mut(&key).and_then(Option::take) {
                    Some(event) => event,
                    None => return drop(held.remove(&key)),
                }
            };
            self.send(event);
        }
    }

    fn send(&self, event: Event) {
        if let Some(events) = self.events.upgrade() {
            // An error says that no monitor listens.
            let _ = events.send(event);
        }
    }
}

impl DiskErrorListener for DeviceEvents {
    fn failed(&self, error: DiskError) {
        let DiskError { disk, node, is_write, no_space, action, reason } = error;
        let kind = EventKind::BlockIoError {
            device: disk.clone(),
            node_name: node,
            operation: if is_write { IoOperation::Write } else { IoOperation::Read },
            action: match action {
                ErrorAction::Report => IoAction::Report,
                ErrorAction::Stop => IoAction::Stop,
                ErrorAction::Ignore => IoAction::Ignore,
            },
            nospace: no_space,
            reason,
        };
        if action == ErrorAction::Stop {
            self.send(Event::now(kind));
        } else {
            self.tell("BLOCK_IO_ERROR", &disk, kind);
        }
    }
}

impl PortEvents for DeviceEvents {
    fn guest_open(&self, id: &str, open: bool) {
        self.tell("VSERPORT_CHANGE", id, EventKind::VserportChange { id: id.to_owned(), open });
    }
}

impl BalloonEvents for DeviceEvents {
    fn changed(&self, memory: u64) {
        self.tell("BALLOON_CHANGE", "", EventKind::BalloonChange { actual: memory });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(action: ErrorAction, reason: &str) -> DiskError {
        DiskError { disk: "d".into(), node: None, is_write: true, no_space: true, action, reason: reason.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_fails_a_thousand_times_a_second_is_heard_once_and_then_of_the_last() {
        let (sender, mut events) = tokio::sync::broadcast::channel(4);
        let teller = DeviceEvents::new(sender.downgrade());
        let reason_of = |event: Event| match event.kind {
            EventKind::BlockIoError { reason, .. } => reason,
            other => panic!("{other:?}"),
        };
        for n in 0..1000 {
            teller.failed(error(ErrorAction::Report, &n.to_string()));
        }
        teller.failed(error(ErrorAction::Stop, "why it stops"));
        assert_eq!(reason_of(events.try_recv().unwrap()), "0");
        assert_eq!(reason_of(events.try_recv().unwrap()), "why it stops");
        assert!(events.try_recv().is_err());
        assert_eq!(reason_of(events.recv().await.unwrap()), "999");
        tokio::time::sleep(3 * PERIOD).await;
        assert!(teller.held.lock().unwrap().is_empty() && events.try_recv().is_err());
        teller.failed(error(ErrorAction::Stop, "again"));
        assert_eq!(reason_of(events.try_recv().unwrap()), "again");
    }
}
