//! Looks at a guest that runs [`payloads::watch`].

use std::time::{Duration, Instant};

use payloads::watch;

use super::{MOST, Server};

/// A guest that watches its memory and its exits, on a function of a server.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    /// On which function.
    pub function: u32,
    sum: u64,
}

impl Watched {
    /// The seed of the payload on a function: each has another.
    pub fn seed(function: u32) -> u64 {
        0x5eed_0000 + u64::from(function)
    }

    /// The guest on a function.
    pub fn new(function: u32) -> Self {
        Self { function, sum: watch::sum(Self::seed(function)) }
    }

    /// How many rounds it has made, every one of them lawful: none is missing, and no byte of its memory has changed.
    ///
    /// # Panics
    /// One isn't.
    pub fn rounds(&self, server: &Server) -> u64 {
        let console = server.console(self.function);
        let (whole, _) = console.rsplit_once('\n').unwrap_or_default();
        let mut rounds = 0;
        for line in whole.lines() {
            rounds += 1;
            if watch::parse_round(line) != Some((rounds, self.sum)) {
                self.unlawful(rounds, server);
            }
        }
        rounds
    }

    /// Waits until it has made some more rounds.
    ///
    /// # Panics
    /// It doesn't, or one isn't lawful.
    pub fn goes_on(&self, server: &Server) {
        let before = self.rounds(server);
        let start = Instant::now();
        while self.rounds(server) < before + 5 {
            assert!(
                start.elapsed() < MOST,
                "VM {} stands still after round {before}\n{}",
                self.function,
                server.story()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The end of a test whose guest wrote something else than its next round.
    fn unlawful(&self, line: u64, server: &Server) -> ! {
        // A guest that was reset goes on to say what it found in its memory.
        std::thread::sleep(Duration::from_secs(2));
        let console = server.console(self.function);
        let lines: Vec<_> = console.lines().skip(line as usize - 1).take(8).collect();
        panic!("VM {}, from line {line} on: {lines:#?}\n{}", self.function, server.story());
    }
}
