//! Messages that are kept, for tests.

use std::sync::{Arc, Mutex};

use crate::interrupt::{Message, MessageRoute, MessageSink};

/// Keeps what is raised.
#[derive(Debug, Default)]
pub(crate) struct TestSink(Arc<Mutex<Vec<Message>>>);

impl TestSink {
    pub(crate) fn raised(&self) -> Vec<Message> {
        self.0.lock().unwrap().clone()
    }
}

#[derive(Debug)]
struct Route {
    message: Mutex<Option<Message>>,
    raised: Arc<Mutex<Vec<Message>>>,
}

impl MessageSink for TestSink {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Route { message: Mutex::new(None), raised: self.0.clone() })
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
