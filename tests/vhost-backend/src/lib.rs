//! Back ends of devices over vhost-user, for tests: of the `vhost-user-backend` crate, so that a front end meets a protocol that others
//! wrote.
//!
//! - `block FILE SOCKET [PLACE:COUNT]`: a disk of two queues that is a file. With the last word it ends at once, as if killed, at its
//!   COUNTth request: `before` it is done, when it is done and the guest wasn't told (`done`), or when that is in the used ring and nobody
//!   was called (`told`).
//! - `recorded FILE SOCKET [PLACE:COUNT]`: the same disk, with a record of what is in flight.
//! - `net STREAM SOCKET`: a network interface whose frames go through the UNIX stream socket STREAM, each behind its length in 4 bytes, the
//!   most significant first: passt's and QEMU's.
//!
//! Each serves one connection on SOCKET and ends with it.

mod block;
mod net;
mod recorded;

use std::sync::{Arc, RwLock};

use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

pub use block::Death;

use self::block::Block;
use self::net::Net;

/// Memory of the front end's.
type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Serves one connection as `args` say.
///
/// # Errors
/// What is wrong with them, or with what they name.
pub fn run(args: &[String]) -> Result<(), String> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["block", file, socket] => serve(Block::open(file, None)?, socket, |_, _| Ok(())),
        ["block", file, socket, death] => serve(Block::open(file, Some(death.parse()?))?, socket, |_, _| Ok(())),
        ["recorded", file, socket] => recorded::serve(Block::open(file, None)?, socket),
        ["recorded", file, socket, death] => recorded::serve(Block::open(file, Some(death.parse()?))?, socket),
        ["net", stream, socket] => serve(Net::connect(stream)?, socket, |net, daemon| {
            let listened = daemon.get_epoll_handlers()[0].register_listener(net.fd(), net::EVENTS, net::FRAME);
            listened.map_err(|e| e.to_string())
        }),
        _ => Err("write block|recorded FILE SOCKET [before|done|told:COUNT], or net STREAM SOCKET".into()),
    }
}

type Daemon<T> = VhostUserDaemon<Arc<RwLock<T>>>;

fn serve<T>(device: T, socket: &str, prepare: impl FnOnce(&T, &Daemon<T>) -> Result<(), String>) -> Result<(), String>
where
    T: VhostUserBackendMut<Bitmap = (), Vring = VringRwLock> + 'static,
{
    let device = Arc::new(RwLock::new(device));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = Daemon::new("vhost-backend".into(), device.clone(), memory).map_err(|e| e.to_string())?;
    prepare(&device.read().expect("nobody panicked"), &daemon)?;
    daemon.serve(socket).map_err(|e| e.to_string())
}

/// What ends the thread of the queues, once the connection has.
fn exit_event() -> Option<(EventConsumer, EventNotifier)> {
    new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
}
