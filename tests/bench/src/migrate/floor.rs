//! What nobody can be below: the same bytes copied by two threads, and sent over two TCP connections, between memory that is there.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use super::Cost;
use super::processes::own_cpu;

/// How many threads, or connections.
const WAYS: usize = 2;
/// What is sent at once.
const BLOCK: usize = 256 << 10;

/// Memory on both sides of a move.
pub(super) struct Sides {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Sides {
    /// Of so many bytes, all of them taken.
    pub(super) fn new(bytes: usize) -> Self {
        // Not zeros alone, which the system gives without taking memory.
        Self { from: vec![0x5a; bytes], to: vec![0xa5; bytes] }
    }

    fn halves(&mut self) -> impl Iterator<Item = (&[u8], &mut [u8])> {
        let part = self.from.len().div_ceil(WAYS);
        self.from.chunks(part).zip(self.to.chunks_mut(part))
    }

    /// Copies.
    pub(super) fn copied(&mut self) -> Cost {
        let (began, before) = (Instant::now(), own_cpu());
        thread::scope(|scope| {
            for (from, to) in self.halves() {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        Cost { ms: began.elapsed().as_secs_f64() * 1e3, cpu_ms: own_cpu() - before }
    }

    /// Sends.
    pub(super) fn sent(&mut self) -> io::Result<Cost> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let mut ways = Vec::new();
        for _ in 0..WAYS {
            ways.push((TcpStream::connect(address)?, listener.accept()?.0));
        }
        let (began, before) = (Instant::now(), own_cpu());
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for ((from, to), (mut sender, mut receiver)) in self.halves().zip(ways) {
                threads.push(scope.spawn(move || from.chunks(BLOCK).try_for_each(|block| sender.write_all(block))));
                threads
                    .push(scope.spawn(move || to.chunks_mut(BLOCK).try_for_each(|block| receiver.read_exact(block))));
            }
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| io::Error::other("a panic"))?)
        })?;
        Ok(Cost { ms: began.elapsed().as_secs_f64() * 1e3, cpu_ms: own_cpu() - before })
    }
}
