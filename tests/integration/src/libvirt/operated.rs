//! The guest [`payloads::operated`] behind `virsh console`.

use std::time::Duration;

use payloads::operated;
use testbed::libvirt::Console;

/// How long the guest may take to say something.
const LIMIT: Duration = Duration::from_secs(60);

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
        let still = |console: &Console| {
            // What was on its way when it was stopped arrives meanwhile.
            std::thread::sleep(Duration::from_millis(300));
            console.text()
        };
        let before = still(&self.0);
        self.types('z');
        assert_eq!(still(&self.0), before);
        resume();
        let last = before.rsplit(operated::TICK).find_map(|rest| u64::from_str_radix(rest.get(..16)?, 16).ok());
        let from = self.0.text().len();
        assert!(from >= before.len());
        self.expect(&said_of('z'));
        assert!(self.0.text()[before.len()..].contains(&format!("{}{:016x}", operated::TICK, last.unwrap() + 1)));
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
