//! The guest [`payloads::operated`] behind `virsh console`.

use std::time::{Duration, Instant};

use payloads::operated;
use testbed::libvirt::Console;

/// How long the guest may take to say something.
const LIMIT: Duration = Duration::from_secs(120);

/// Whoever operates it.
#[derive(Debug)]
pub struct Operated(pub Console);

impl Operated {
    /// It has been started anew: its ticks begin again.
    ///
    /// # Panics
    /// It isn't.
    pub fn is_up(&mut self) {
        self.expect(operated::UP);
        assert_eq!(self.tick(), 1);
    }

    /// Waits for its next tick; which one it is.
    ///
    /// # Panics
    /// There is none.
    pub fn tick(&mut self) -> u64 {
        self.expect(operated::TICK);
        let number = self.expect("\r\n");
        u64::from_str_radix(&number, 16).unwrap_or_else(|_| panic!("tick {number:?}"))
    }

    /// It ticks, and answers to a key.
    ///
    /// # Panics
    /// It doesn't.
    pub fn answers(&mut self, key: char) {
        self.types(key);
        self.expect(&said_of(key));
        self.tick();
    }

    /// Gives it a key that it does something by.
    ///
    /// # Panics
    /// It doesn't tick.
    pub fn does(&mut self, key: char) {
        self.tick();
        self.types(key);
    }

    /// Not a tick is lost while it stands still, and what is typed meanwhile isn't either.
    ///
    /// # Panics
    /// It doesn't stand still, or doesn't go on.
    pub fn stands_still_and_goes_on(&mut self, suspend: impl FnOnce(), resume: impl FnOnce()) {
        suspend();
        let before = self.stands_still();
        self.types('z');
        assert_eq!(self.stands_still(), before);
        resume();
        let last = before.rsplit(operated::TICK).find_map(|rest| u64::from_str_radix(rest.get(..16)?, 16).ok());
        self.expect(&said_of('z'));
        // Of the key and the next tick either may come first.
        self.tick();
        // It may have been stopped within a line.
        let line = before.rfind('\n').map_or(0, |end| end + 1);
        let next = format!("{}{:016x}", operated::TICK, last.expect("a tick") + 1);
        let text = self.0.text();
        assert!(text.starts_with(&before) && text[line..].contains(&next), "no {next:?} in {:?}", &text[line..]);
    }

    /// Waits until nothing arrives any more that was on its way when it was stopped; all that was shown until then.
    fn stands_still(&self) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let text = self.0.text();
            std::thread::sleep(Duration::from_millis(500));
            if self.0.text() == text {
                return text;
            }
            assert!(Instant::now() < end, "it goes on");
        }
    }

    fn expect(&mut self, text: &str) -> String {
        self.0.expect(text, LIMIT).expect("it says so")
    }

    fn types(&mut self, key: char) {
        self.0.type_text(&key.to_string()).expect("the console takes keys");
    }
}

fn said_of(key: char) -> String {
    format!("{}{:016x}", operated::KEY, u32::from(key))
}
