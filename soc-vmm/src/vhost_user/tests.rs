//! Back ends that keep the protocol to a point.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::notices::Notices;
use super::socket::{Socket, take_notices};
use super::wire::{CONFIG_CHANGED, Header, NEED_REPLY, REPLY, Request, VERSION, protocol};
use super::{Frontend, QueueSetup, Region, Setup, VhostUserError};

/// Virtio 1, and the protocol's features.
const FEATURES: u64 = 1 << 32 | 1 << 30;
const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(60);

/// The other end, which answers each request as `script` says, until it says nothing.
struct Script(JoinHandle<Vec<Heard>>);

/// A request and its payload.
type Heard = (u32, Vec<u8>);

impl Script {
    fn start(mut script: impl FnMut(&Header, &mut UnixStream) -> bool + Send + 'static) -> (Self, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = spawn(move || {
            let mut heard = Vec::new();
            let mut header = [0; 12];
            while theirs.read_exact(&mut header).is_ok() {
                let header = Header::read_from_bytes(&header).unwrap();
                let mut payload = vec![0; header.size as usize];
                theirs.read_exact(&mut payload).unwrap();
                heard.push((header.request, payload));
                if !script(&header, &mut theirs) {
                    break;
                }
            }
            heard
        });
        (Self(thread), ours)
    }

    fn heard(self) -> Vec<Heard> {
        self.0.join().unwrap()
    }
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { request, flags: VERSION | flags, size: payload.len() as u32 };
    [header.as_bytes(), payload].concat()
}

/// Answers as a back end does that has those features of the protocol.
fn polite(features: u64, header: &Header, to: &mut UnixStream) -> bool {
    let number = |number: u64| message(header.request, REPLY, number.as_bytes());
    let answer = match header.request {
        1 => number(FEATURES),
        15 => number(features),
        17 => number(4),
        11 => message(11, REPLY, &[0; 8]),
        _ if header.flags & NEED_REPLY != 0 => number(0),
        _ => return true,
    };
    to.write_all(&answer).is_ok()
}

fn connect(script: impl FnMut(&Header, &mut UnixStream) -> bool + Send + 'static) -> Result<Frontend, VhostUserError> {
    let (_, stream) = Script::start(script);
    Frontend::new(stream, LONG, false)
}

#[test]
fn queues_are_started_and_stopped_in_the_protocols_order() {
    for acknowledges in [true, false] {
        let features = 1 << protocol::MQ | u64::from(acknowledges) << protocol::REPLY_ACK | 1 << 13;
        let (script, stream) = Script::start(move |header, to| polite(features, header, to));
        let mut frontend = Frontend::new(stream, LONG, false).unwrap();
        assert_eq!((frontend.features(), frontend.queues()), (1 << 32, Some(4)));
        let event = EventFd::new().unwrap();
        let file = event.as_fd();
        let memory = Region { file, offset: 0, size: 0x1000, guest: 1 << 32, user: 1 << 32 };
        let (kick, call) = (&event, &event);
        let queue = |index| QueueSetup {
            index,
            size: 8,
            base: 0,
            descriptors: 1,
            available: 2,
            used: 3,
            used_guest: 4,
            kick,
            call,
            enabled: index == 0,
        };
        let queues = [queue(0), queue(3)];
        let setup = Setup { features: 1 << 32, memory: &[memory], log: None, queues: &queues };
        frontend.start(&setup, &mut None).unwrap();
        frontend.stop([0]).unwrap();
        drop(frontend);
        let heard = script.heard();
        let requests: Vec<u32> = heard.iter().map(|(request, _)| *request).collect();
        let mut expected = vec![1, 15, 16, 3, 17, 2, 5, 8, 10, 9, 12, 13, 8, 10, 9, 12, 13, 18, 18];
        expected.extend((!acknowledges).then_some(1));
        expected.push(11);
        assert_eq!(requests, expected);
        // Only what is known is agreed on.
        let agreed = u64::read_from_bytes(&heard[2].1).unwrap();
        assert_eq!(agreed, features & !(1 << 13));
        assert_eq!(heard[5].1, FEATURES.as_bytes());
        let golden = [1u64, 1 << 32, 0x1000, 1 << 32, 0];
        assert_eq!(heard[6].1, golden.as_bytes());
        assert_eq!(heard[9].1, [0u64, 1, 3, 2, 0].as_bytes());
        assert_eq!((&heard[17].1[..], &heard[18].1[..]), ([0u32, 1].as_bytes(), [3u32, 0].as_bytes()));
    }
}

#[test]
fn who_can_tells_the_network_of_a_guest_that_has_moved() {
    for can in [true, false] {
        let features = u64::from(can) << protocol::RARP | 1 << protocol::REPLY_ACK;
        let (script, stream) = Script::start(move |header, to| polite(features, header, to));
        let mut frontend = Frontend::new(stream, LONG, false).unwrap();
        frontend.announce([2, 3, 4, 5, 6, 7]).unwrap();
        drop(frontend);
        let said: Vec<Heard> = script.heard().into_iter().filter(|(request, _)| *request == 19).collect();
        assert_eq!(said, can.then(|| (19, vec![2, 3, 4, 5, 6, 7, 0, 0])).into_iter().collect::<Vec<_>>());
    }
}

/// Starts one queue on a back end that keeps a record of `size` bytes, twice over the same memory; what it heard.
fn recorded(size: u64) -> (Result<(), VhostUserError>, Vec<Heard>) {
    let features = 1 << protocol::REPLY_ACK | 1 << protocol::INFLIGHT_SHMFD;
    let (script, stream) = Script::start(move |header, to| match header.request {
        31 => to.write_all(&message(31, REPLY, [size, 0, 0].as_bytes())).is_ok(),
        _ => polite(features, header, to),
    });
    let mut frontend = Frontend::new(stream, LONG, true).unwrap();
    assert!(frontend.records());
    let event = EventFd::new().unwrap();
    let region = |guest, offset| Region { file: event.as_fd(), offset, size: 0x1000, guest, user: guest + 1 };
    let (kick, call) = (&event, &event);
    let queue = || QueueSetup {
        index: 1,
        size: 8,
        base: 7,
        descriptors: 1,
        available: 2,
        used: 3,
        used_guest: 4,
        kick,
        call,
        enabled: true,
    };
    let mut record = None;
    let memory = [region(0, 0x2000), region(0x8000, 0)];
    let queues = [queue()];
    let setup = Setup { features: 1 << 32, memory: &memory, log: None, queues: &queues };
    let mut start = || frontend.start(&setup, &mut record);
    let started = start().and_then(|()| start());
    drop(frontend);
    (started, script.heard())
}

#[test]
fn a_record_is_made_once_and_given_with_each_start() {
    let (started, heard) = recorded(256);
    started.unwrap();
    let requests: Vec<u32> = heard.iter().map(|(request, _)| *request).collect();
    assert_eq!(requests[4..], [2, 31, 32, 5, 8, 10, 9, 12, 13, 18, 2, 32, 5, 8, 10, 9, 12, 13, 18]);
    // Of two queues of 8; then of as many bytes as it said.
    let asked = [0u64, 0, 2 | 8 << 16];
    assert_eq!((heard[5].1.as_bytes(), heard[6].1.as_bytes()), (asked.as_bytes(), [256, 0, asked[2]].as_bytes()));
    assert_eq!(heard[7].1, [2u64, 0, 0x1000, 1, 0x2000, 0x8000, 0x1000, 0x8001, 0].as_bytes());
    assert_eq!(heard[9].1, [1u32, 7].as_bytes());
    assert_eq!(heard[15].1, heard[6].1);
}

#[test]
fn a_record_of_a_size_that_none_has_ends_the_connection() {
    for size in [0, 1 << 20, u64::MAX] {
        let error = recorded(size).0.unwrap_err().to_string();
        assert!(error.contains("a record of requests in flight of a size that none has"), "{error}");
    }
}

#[test]
fn an_answer_that_is_none_ends_the_connection() {
    let answers: [(&str, Vec<u8>); 6] = [
        ("another question", message(2, REPLY, &FEATURES.to_ne_bytes())),
        ("another question", message(1, 0, &FEATURES.to_ne_bytes())),
        ("longer than any", [[1, 5, 4097].as_bytes(), &[0; 4097]].concat()),
        ("longer than any", [1, 5, u32::MAX].as_bytes().to_vec()),
        ("no number of 8 bytes", message(1, REPLY, &[0; 4])),
        ("closed the connection", message(1, REPLY, &FEATURES.to_ne_bytes())[..17].to_vec()),
    ];
    for (what, answer) in answers {
        let error = connect(move |_, to| to.write_all(&answer).is_err()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn one_that_says_nothing_or_takes_its_time_is_left() {
    // A byte at a time would hold whoever waits for each of them anew.
    for step in [None, Some(1)] {
        let (script, stream) = Script::start(move |_, to| {
            let answer = message(1, REPLY, &FEATURES.to_ne_bytes());
            for bytes in step.iter().flat_map(|step| answer.chunks(*step)) {
                std::thread::sleep(SHORT / 8);
                if to.write_all(bytes).is_err() {
                    return false;
                }
            }
            // It goes when the front end has gone.
            to.read(&mut [0]).is_err()
        });
        let error = Frontend::new(stream, SHORT, false).unwrap_err();
        assert!(matches!(error, VhostUserError::Silent { request: Request::GetFeatures, .. }), "{error}");
        script.heard();
    }
}

#[test]
fn one_that_doesnt_read_is_left() {
    let (_theirs, ours) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    while (&ours).write(&[0; 4096]).is_ok() {}
    let error = Frontend::new(ours, SHORT, false).unwrap_err();
    assert!(matches!(error, VhostUserError::Silent { .. }), "{error}");
}

#[test]
fn one_that_is_too_old_or_refuses_says_so() {
    let old = connect(|header, to| to.write_all(&message(header.request, REPLY, &[0; 8])).is_ok()).unwrap_err();
    assert_eq!(old.to_string(), "the back end has no virtio 1 (VIRTIO_F_VERSION_1)");
    let refuses = |header: &Header, to: &mut UnixStream| match header.request {
        3 => to.write_all(&message(3, REPLY, &7u64.to_ne_bytes())).is_ok(),
        _ => polite(1 << protocol::REPLY_ACK, header, to),
    };
    assert_eq!(connect(refuses).unwrap_err().to_string(), "the back end refuses SetOwner with error 7");
}

#[test]
fn descriptors_that_it_sends_are_not_kept() {
    let open = || {
        std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| {
            let link = std::fs::read_link(fd.unwrap().path()).ok()?;
            link.to_str()?.contains("vhost-user-gift").then_some(())
        })
    };
    let gift = pcie_function::local::sealed_memfd("vhost-user-gift", 4096).unwrap();
    let frontend = connect(move |header, to| {
        let answer = message(header.request, REPLY, &(1u64 << 32).to_ne_bytes());
        let fds = [gift.as_raw_fd(); 8];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(to.as_raw_fd(), &[std::io::IoSlice::new(&answer)], &rights, MsgFlags::empty(), None).is_ok()
    });
    frontend.unwrap();
    // The script has its own, or has ended with it.
    assert!(open().count() <= 1);
}

/// Its own messages until there are no more: whether the channel is open, and whether the configuration has changed.
fn told(messages: &[&[u8]]) -> (Result<bool, String>, bool, Vec<u8>) {
    let (mut notices, mut theirs) = Notices::pair().unwrap();
    let mut open = Ok(true);
    for part in messages {
        theirs.write_all(part).unwrap();
        open = notices.take().map_err(|error| error.to_string());
    }
    theirs.set_nonblocking(true).unwrap();
    let mut answers = vec![0; 64];
    let count = theirs.read(&mut answers).unwrap_or(0);
    answers.truncate(count);
    (open, notices.take_change(), answers)
}

#[test]
fn its_own_messages_are_taken_whole_or_in_pieces_and_answered_if_it_wants_that() {
    let change = message(CONFIG_CHANGED, 0, &[]);
    assert_eq!(told(&[&change]), (Ok(true), true, vec![]));
    assert_eq!(told(&[&change[..5], &change[5..]]), (Ok(true), true, vec![]));
    let asks = message(CONFIG_CHANGED, NEED_REPLY, &[]);
    assert_eq!(told(&[&asks]), (Ok(true), true, message(CONFIG_CHANGED, REPLY, &[0; 8])));
    // One of those that were not agreed on.
    let other = message(3, NEED_REPLY, &[0; 24]);
    assert_eq!(told(&[&other]), (Ok(true), false, message(3, REPLY, &1u64.to_ne_bytes())));
    let long = [CONFIG_CHANGED, VERSION, 4097];
    let none = "the back end breaks the protocol: a message of its own that is none";
    assert_eq!(told(&[long.as_bytes()]).0, Err(none.to_owned()));
}

#[test]
fn a_channel_that_is_closed_is_not_looked_at_again() {
    let (notices, theirs) = Notices::pair().unwrap();
    drop(theirs);
    let mut channel = Some(notices);
    take_notices(&mut channel).unwrap();
    assert!(channel.is_none());
}

#[test]
fn one_that_waits_for_an_answer_before_it_gives_one_gets_it() {
    let (notices, mut channel) = Notices::pair().unwrap();
    let (script, stream) = Script::start(move |header, to| {
        channel.write_all(&message(CONFIG_CHANGED, NEED_REPLY, &[])).unwrap();
        channel.read_exact(&mut [0; 20]).unwrap();
        polite(0, header, to)
    });
    let mut socket = Socket::new(stream, LONG).unwrap();
    socket.begin();
    socket.send(Request::GetFeatures, 0, &[], &[]).unwrap();
    let mut notices = Some(notices);
    assert_eq!(socket.answer(Request::GetFeatures, &mut notices).unwrap(), FEATURES.to_ne_bytes());
    assert!(notices.unwrap().take_change());
    drop(socket);
    script.heard();
}
