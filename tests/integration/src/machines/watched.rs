//! Looks at a guest that runs [`payloads::watch`].

use payloads::watch;

use super::Server;

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
            assert_eq!(watch::parse_round(line), Some((rounds, self.sum)), "VM {}: {line:?}", self.function);
        }
        rounds
    }

    /// Waits until it has made some more rounds.
    ///
    /// # Panics
    /// It doesn't, or one isn't lawful.
    pub fn goes_on(&self, server: &Server) {
        let before = self.rounds(server);
        server.wait_until(&format!("VM {} goes on", self.function), || self.rounds(server) >= before + 5);
    }
}
