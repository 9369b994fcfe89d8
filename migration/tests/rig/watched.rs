//! A migration's handle, and what it has told.

use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use migration::{Control, Event, Parameters, Phase};

pub(crate) struct Watched {
    control: Control,
    told: Arc<(Mutex<Vec<Event>>, Condvar)>,
}

impl Watched {
    pub(crate) fn new(parameters: Parameters) -> Self {
        let told = Arc::<(Mutex<Vec<Event>>, Condvar)>::default();
        let kept = Arc::clone(&told);
        let control = Control::telling(parameters, move |event| {
            kept.0.lock().unwrap().push(event);
            kept.1.notify_all();
        });
        Self { control, told }
    }

    /// All so far.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.told.0.lock().unwrap().clone()
    }

    pub(crate) fn phases(&self) -> Vec<Phase> {
        let phase = |event| if let Event::Phase(phase) = event { Some(phase) } else { None };
        self.events().into_iter().filter_map(phase).collect()
    }

    /// Waits until it has been in the phase of that name, at most as long as anything here takes.
    pub(crate) fn reaches(&self, word: &str) {
        let is_it = |event: &Event| matches!(event, Event::Phase(phase) if phase.word() == word);
        let told = self.told.0.lock().unwrap();
        let waits = |told: &mut Vec<Event>| !told.iter().any(is_it);
        let (told, waited) = self.told.1.wait_timeout_while(told, Duration::from_secs(60), waits).unwrap();
        assert!(!waited.timed_out(), "it never reaches {word}: {told:?}");
    }
}

impl Deref for Watched {
    type Target = Control;

    fn deref(&self) -> &Control {
        &self.control
    }
}
