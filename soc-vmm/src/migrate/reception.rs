//! Where those who come by TLS show who they are. Several do so at once, each in a thread of its own, and the protocol hears of those alone
//! that have: a stranger neither holds up a guest that is on its way, nor ends the wait for one.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread::Builder;
use std::time::{Duration, Instant};

use migration::Connection;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connect::Door;
use super::secure::{Secure, connection};
use crate::cli::with_causes;
use crate::control::ListeningSocket;
use crate::tls::TlsStream;
use crate::virtio::complaint::Rarely;

/// How long somebody may take to show who it is.
const GREETING: Duration = Duration::from_secs(10);
/// Most handshakes at a time: a migration's connections, and some strangers'. Who comes then waits at the door.
const MOST: usize = 32;

/// Where those who come show who they are.
pub(super) struct Reception {
    listener: Listener,
    tls: Secure,
    /// Rings when a handshake is over.
    bell: Arc<EventFd>,
    over: mpsc::Receiver<Greeted>,
    says: mpsc::Sender<Greeted>,
    under_way: usize,
    complaints: Rarely,
}

/// Who it was, and what came of it.
type Greeted = (String, io::Result<TlsStream>);

enum Listener {
    Tcp(TcpListener),
    Unix(Arc<ListeningSocket>),
}

impl Reception {
    /// Behind a door that listens.
    pub(super) fn new(door: Door, tls: Secure) -> io::Result<Self> {
        let listener = match door {
            Door::Tcp(listener) => Listener::Tcp(listener),
            Door::Unix(listener) => Listener::Unix(listener),
            Door::Guarded(_) | Door::Once(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        let bell = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (says, over) = mpsc::channel();
        Ok(Self { listener, tls, bell, over, says, under_way: 0, complaints: Rarely::default() })
    }

    /// The socket that has a path, where it is one.
    pub(super) fn socket(&self) -> Option<&Arc<ListeningSocket>> {
        match &self.listener {
            Listener::Tcp(_) => None,
            Listener::Unix(socket) => Some(socket),
        }
    }

    /// Waits for a connection of somebody who has shown who it is; none: there was none for that long.
    pub(super) fn accept(&mut self, patience: Duration) -> io::Result<Option<Connection>> {
        let deadline = Instant::now() + patience;
        loop {
            while let Ok((who, greeted)) = self.over.try_recv() {
                self.under_way -= 1;
                match greeted {
                    Ok(stream) => return Ok(Some(connection(stream))),
                    Err(e) => self.turned_away(&who, &e),
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            if self.knocks(left)? {
                let (socket, who) = self.listener.accept()?;
                if let Err(e) = self.greet(socket, who.clone()) {
                    self.turned_away(&who, &e);
                }
            }
        }
    }

    /// Whether somebody new is there, within that time, or until a handshake is over.
    fn knocks(&self, patience: Duration) -> io::Result<bool> {
        // Rounded up: less than a millisecond is no reason to spin.
        let patience = PollTimeout::try_from(patience + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let listens = if self.under_way < MOST { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = [PollFd::new(self.bell.as_fd(), PollFlags::POLLIN), PollFd::new(self.listener.fd(), listens)];
        match poll(&mut fds, patience) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let has = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
        let knocks = has(&fds[1]);
        if has(&fds[0]) {
            // What it rang for is looked at next; another one may have taken it.
            _ = self.bell.read();
        }
        Ok(knocks)
    }

    fn greet(&mut self, socket: OwnedFd, who: String) -> io::Result<()> {
        let stream = self.tls.stream(socket)?;
        let (says, bell) = (self.says.clone(), Arc::clone(&self.bell));
        Builder::new().name("tls-handshake".into()).spawn(move || {
            let greeted = stream.handshake(GREETING).map(|()| stream);
            // Nobody is at the door any more.
            _ = says.send((who, greeted));
            _ = bell.write(1);
        })?;
        self.under_way += 1;
        Ok(())
    }

    fn turned_away(&mut self, who: &str, why: &io::Error) {
        let why = with_causes(why);
        self.complaints.say(Instant::now(), format_args!("{who} wanted to bring a guest and was turned away: {why}"));
    }
}

impl Listener {
    /// Who is there, and how they are called in the log.
    fn accept(&self) -> io::Result<(OwnedFd, String)> {
        match self {
            Self::Tcp(listener) => {
                let (socket, address) = listener.accept()?;
                socket.set_nodelay(true)?;
                Ok((socket.into(), address.to_string()))
            }
            Self::Unix(socket) => Ok((socket.listener().accept()?.0.into(), "somebody on this machine".into())),
        }
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(socket) => socket.listener().as_fd(),
        }
    }
}

impl fmt::Debug for Reception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reception").field("under_way", &self.under_way).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::thread;

    use tempfile::TempDir;
    use testbed::certificates::of_localhost;

    use super::*;
    use crate::migrate::{Uri, Way};
    use crate::tls::{CredentialsSpec, Endpoint};

    #[test]
    fn strangers_hold_up_nobody_and_are_turned_away() {
        let dir = TempDir::new().unwrap();
        of_localhost(dir.path()).unwrap();
        let way = Way::Tcp("127.0.0.1".into(), 0).with(Secure::destination(dir.path()).unwrap()).unwrap();
        let mut door = Door::open(way).unwrap();
        let address = match &door {
            Door::Guarded(Reception { listener: Listener::Tcp(listener), .. }) => listener.local_addr().unwrap(),
            _ => unreachable!("it listens"),
        };
        // Those who say nothing, those who say something else, and then the one who is waited for, thrice.
        let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        let mut plain = TcpStream::connect(address).unwrap();
        plain.write_all(b"OUTBOARD").unwrap();
        let comes = thread::spawn(move || {
            let spec = CredentialsSpec { dir: dir.path().into(), endpoint: Endpoint::Client, verify_peer: true };
            let uri = Uri::Tls(address.ip().to_string(), address.port());
            let secure = Secure::of(&spec, true, &uri, None).unwrap();
            for number in 0..3u8 {
                let socket = TcpStream::connect(address).unwrap();
                let mut connection = secure.connection(socket.into(), true).unwrap();
                connection.writer.write_all(&[number]).unwrap();
                connection.reader.read_exact(&mut [0]).unwrap();
            }
        });
        for number in 0..3 {
            let mut connection = loop {
                // Of the 20 none is waited for: each would have 10 s.
                if let Some(connection) = door.accept(Duration::from_secs(5)).unwrap() {
                    break connection;
                }
            };
            let mut said = [9];
            connection.reader.read_exact(&mut said).unwrap();
            assert_eq!(said, [number]);
            connection.writer.write_all(&said).unwrap();
        }
        comes.join().unwrap();
        let mut told = Vec::new();
        plain.read_to_end(&mut told).unwrap();
        assert_eq!(told[..2], [21, 3], "who speaks no TLS is told so");
        drop(silent);
    }
}
