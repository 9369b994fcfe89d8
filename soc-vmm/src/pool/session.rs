//! A client of the pool, from its connection to its end.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use api_channel::call::CpuidEntry;
use pcie_function::header::Role;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tokio::time::timeout;

use super::door::{self, Opened};
use super::server::Shared;
use super::table::{PATIENCE, Taken, Tenant};
use super::wire::{Complaint, MOST_REQUEST, Reply, Request, VERSION, line};
use crate::function;
use crate::probe::Ask;
use crate::rights;

/// How long a client may take to say what it wants, and to take the answer.
const CLIENT: Duration = Duration::from_secs(10);

/// Serves a client until it hangs up, breaks the protocol, or has its answer.
pub(super) async fn attend(stream: &UnixStream, shared: &Shared, peer: &UCred) {
    let Ok(Some(request)) = timeout(CLIENT, next_line(stream)).await else { return };
    if !shared.admits(peer.uid()) {
        let why = format!("user {} is not among the pool's users", peer.uid());
        return answer(stream, &Reply::refused(why)).await;
    }
    match Request::parse(&request) {
        Ok(Request::List { .. }) => {
            let functions = shared.table().list();
            answer(stream, &Reply::List { version: VERSION, functions }).await;
        }
        Ok(Request::Host { .. }) => answer(stream, &host(shared).await).await,
        Ok(Request::Function { vm, .. }) => {
            lend(stream, shared, &Tenant { uid: peer.uid(), pid: peer.pid(), vm }).await;
        }
        Err(why) => answer(stream, &Reply::refused(why)).await,
    }
}

/// What the server tells of its processors.
async fn host(shared: &Shared) -> Reply {
    let Some(spec) = &shared.host else {
        return Reply::refused("the configuration's pool names no host: give it host = \"pci:BDF\" or \"card:SOCKET\"");
    };
    match timeout(PATIENCE, function::open(spec, Role::Host, Ask)).await {
        Ok(Ok(table)) => {
            let words = |e: CpuidEntry| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
            Reply::Host { version: VERSION, cpuid: table.into_iter().map(words).collect() }
        }
        Ok(Err(e)) => Reply::refused(e.to_string()),
        Err(_) => Reply::refused(format!("the host function {spec} does not answer; another program may use it")),
    }
}

/// Finds a function for a client, and takes it back when the client is gone.
async fn lend(stream: &UnixStream, shared: &Shared, tenant: &Tenant) {
    loop {
        let changed = shared.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let taken = shared.table().take(tenant);
        match taken {
            Taken::Refused(why) => return answer(stream, &Reply::refused(why)).await,
            Taken::Wait => tokio::select! {
                () = changed => {}
                // It has nothing to say before it has a function.
                _ = next_line(stream) => return,
            },
            Taken::Function(index) => {
                let opened = timeout(PATIENCE, door::open(&shared.functions[index])).await;
                let opened = opened.unwrap_or_else(|_| Err("another program uses it, or it is stuck".into()));
                let done = match opened {
                    Ok(opened) => {
                        let name = shared.functions[index].to_string();
                        let complaint = hand_over(stream, name, opened).await;
                        shared.table().given_back(index, complaint, Instant::now());
                        true
                    }
                    Err(why) => {
                        shared.table().failed(index, why);
                        false
                    }
                };
                shared.changed.notify_waiters();
                if done {
                    return;
                }
            }
        }
    }
}

/// Hands a function over, and takes it back once its client is gone; what that one complained of.
async fn hand_over(stream: &UnixStream, name: String, opened: Opened) -> Option<String> {
    let Opened { descriptors, hold } = opened;
    let reply = line(&Reply::Function { version: VERSION, function: name });
    // All at once: so little always has room in a socket that nothing was written to.
    let send = || rights::send(stream, &reply, &descriptors).map_err(std::io::Error::from);
    let sent = timeout(CLIENT, stream.async_io(Interest::WRITABLE, send)).await;
    let sent = sent.is_ok_and(|sent| sent.is_ok_and(|sent| sent == reply.len()));
    drop(descriptors);
    let complaint = if sent { complaint(stream).await } else { None };
    hold.revoke();
    complaint
}

/// Waits until a client that has a function gives it back; what it complained of.
async fn complaint(stream: &UnixStream) -> Option<String> {
    let complaint = Complaint::parse(&next_line(stream).await?)?;
    // It hangs up, or says what it may not.
    next_line(stream).await;
    Some(complaint.unusable)
}

/// A client's next line; `None` once it has hung up, or where no line of legal length comes.
async fn next_line(stream: &UnixStream) -> Option<Vec<u8>> {
    let mut read = Vec::new();
    loop {
        stream.readable().await.ok()?;
        // Byte by byte would do: a client says one thing at a time, and what comes after its line is not asked for yet.
        let mut some = [0; 512];
        match stream.try_read(&mut some) {
            Ok(0) => return None,
            Ok(count) => read.extend_from_slice(&some[..count]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
            Err(_) => return None,
        }
        match read.iter().position(|byte| *byte == b'\n') {
            Some(end) if end + 1 == read.len() && read.len() <= MOST_REQUEST => {
                read.pop();
                return Some(read);
            }
            Some(_) => return None,
            None if read.len() >= MOST_REQUEST => return None,
            None => {}
        }
    }
}

/// Answers, for as long as the client may take; it is hung up on afterwards.
async fn answer(stream: &UnixStream, reply: &Reply) {
    let reply = line(reply);
    let write = async {
        let mut rest = reply.as_slice();
        while !rest.is_empty() {
            stream.writable().await?;
            match stream.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    };
    // Whoever doesn't take it has hung up, or does without.
    let _ = timeout(CLIENT, write).await;
}
