//! Messages that are kept, for tests.

use std::sync::{Arc, Mutex};

use crate::interrupt::{Message, MessageRoute, MessageSink};

/// Keeps what is raised, and knows what can be.
#[derive(Debug, Default)]
pub(crate) struct TestSink {
    raised: Arc<Mutex<Vec<Message>>>,
    routed: Mutex<Vec<Arc<Mutex<Option<Message>>>>>,
}

impl TestSink {
    pub(crate) fn raised(&self) -> Vec<Message> {
        self.raised.lock().unwrap().clone()
    }

    /// The messages that routes have.
    pub(crate) fn routed(&self) -> Vec<Message> {
        self.routed.lock().unwrap().iter().filter_map(|message| *message.lock().unwrap()).collect()
    }
}

#[derive(Debug)]
struct Route {
    message: Arc<Mutex<Option<Message>>>,
    raised: Arc<Mutex<Vec<Message>>>,
}

impl MessageSink for TestSink {
    fn route(&self) -> Box<dyn MessageRoute> {
        let message = Arc::<Mutex<_>>::default();
        self.routed.lock().unwrap().push(message.clone());
        Box::new(Route { message, raised: self.raised.clone() })
    }
}

impl MessageRoute for Route {
    fn set(&self, message: Option<Message>) {
        *self.message.lock().unwrap() = message;
    }

    fn raise(&self) {
        self.raised.lock().unwrap().extend(*self.message.lock().unwrap());
    }
}
