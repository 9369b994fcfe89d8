//! Both ends of the protocol, against each other, against bytes that are written down, and against peers that say anything.

use std::io::{self, Cursor, Read, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use tokio::sync::broadcast;
use wire_kit::golden;

use super::wire::{Reply, Request, command, error, flag};
use super::*;
use crate::block::{BlockBackend, BlockError, ImageSpec, check_range, open};
use crate::cli::with_causes;

/// A disk in memory, which can be at fault.
struct HeapDisk(Mutex<Vec<u8>>);

impl HeapDisk {
    fn new(byte: u8, len: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![byte; len])))
    }
}

impl BlockBackend for HeapDisk {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        buf.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, data.len() as u64, self.size())?;
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        check_range(offset, len, self.size())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<(), BlockError> {
        check_range(offset, len, self.size())?;
        self.0.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

/// One export.
struct Shown(Export);

impl Gallery for Shown {
    fn find(&self, name: &str) -> Option<Export> {
        (name == self.0.name).then(|| self.0.clone())
    }

    fn names(&self) -> Vec<String> {
        vec![self.0.name.clone()]
    }
}

fn shown(writable: bool, image: Arc<dyn BlockBackend>) -> Shown {
    Shown(Export::new("e".into(), "disk".into(), "node".into(), writable, image))
}

/// A peer whose words are known from the start.
struct Tape {
    said: Cursor<Vec<u8>>,
    heard: Vec<u8>,
}

impl Tape {
    fn new(said: Vec<u8>) -> Self {
        Self { said: Cursor::new(said), heard: Vec::new() }
    }
}

impl Read for Tape {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.said.read(buf)
    }
}

impl Write for Tape {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.heard.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Tape {}

#[test]
fn the_bytes_of_a_conversation_stay() {
    let disk = HeapDisk::new(0x11, 4096);
    let mut tape = Tape::new(golden("nbd/client.hex"));
    serve(&mut tape, &shown(true, disk.clone())).unwrap();
    assert_eq!(tape.heard, golden("nbd/server.hex"), "{:02x?}", tape.heard);
    assert!(tape.heard.starts_with(&golden("nbd/greeting.hex")));
    let bytes = disk.0.lock().unwrap();
    assert!(bytes[512..1024].iter().all(|byte| *byte == 0) && bytes[..512].iter().all(|byte| *byte == 0x11));
}

#[test]
fn a_client_says_what_is_written_down() {
    let (said, answers) = (golden("nbd/client.hex"), golden("nbd/server.hex"));
    let mut tape = Tape::new(answers);
    let offer = negotiate(&mut tape, "disk").unwrap();
    assert_eq!((offer.size, offer.most), (4096, REQUEST_MOST));
    assert!(offer.flags & flag::SEND_WRITE_ZEROES != 0 && offer.flags & flag::READ_ONLY == 0);
    assert!(said.starts_with(&tape.heard), "{:02x?}", tape.heard);
}

/// What a server answers to requests behind a handshake: the errors of those that are replied to, and how it ends.
fn replies(writable: bool, requests: &[u8]) -> (Vec<(u64, u32)>, Result<(), NbdError>) {
    let handshake = golden("nbd/client.hex")[..32].to_vec();
    let mut tape = Tape::new([handshake, requests.to_vec()].concat());
    let ended = serve(&mut tape, &shown(writable, HeapDisk::new(0x11, 4096)));
    // The handshake's answers have 18 + 32 + 34 + 20 bytes.
    let mut heard = &tape.heard[104..];
    let mut replies = Vec::new();
    while let Ok(reply) = super::stream::get::<Reply>(&mut heard) {
        replies.push((reply.cookie.get(), reply.error.get()));
    }
    (replies, ended)
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_connection_goes_on() {
    use zerocopy::IntoBytes;
    let request = |kind, flags, cookie, offset, len| Request::new(kind, flags, cookie, offset, len).as_bytes().to_vec();
    let requests = [
        request(command::READ, 0, 1, 4096, 1),
        request(command::READ, 0, 2, u64::MAX, 512),
        request(command::READ, 0, 3, 0, REQUEST_MOST + 1),
        request(command::READ, 1 << 9, 4, 0, 512),
        request(command::WRITE, 0, 5, 4000, 512),
        vec![0xee; 512],
        request(command::TRIM, 0, 6, 0, 8192),
        request(77, 0, 7, 0, 0),
        request(command::FLUSH, 0, 8, 0, 0),
    ];
    let (told, ended) = replies(true, &requests.concat());
    let expected = [
        (1, error::INVAL),
        (2, error::INVAL),
        (3, error::OVERFLOW),
        (4, error::INVAL),
        (5, error::NOSPC),
        (6, error::NOSPC),
        (7, error::INVAL),
        (8, 0),
    ];
    assert_eq!(told, expected);
    // It goes without goodbye.
    assert!(matches!(ended, Err(NbdError::Unreachable(_))), "{ended:?}");
    let writes = [command::WRITE, command::TRIM, command::WRITE_ZEROES].map(|kind| request(kind, 0, 9, 0, 0)).concat();
    assert_eq!(replies(false, &writes).0, [(9, error::PERM); 3]);
    assert!(matches!(replies(true, &[0; 28]).1, Err(NbdError::Protocol(_))));
    let much = request(command::WRITE, 0, 1, 0, REQUEST_MOST + 1);
    assert!(matches!(replies(true, &much).1, Err(NbdError::Protocol(_))));
}

/// An option, by its number and its bytes.
fn option(number: u32, bytes: &[u8]) -> Vec<u8> {
    use zerocopy::IntoBytes;
    [wire::OptionHead::new(number, bytes.len() as u32).as_bytes(), bytes].concat()
}

#[test]
fn exports_are_listed_and_what_is_unknown_is_refused_by_number() {
    let go = |name: &str| [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
    let said = [
        vec![0, 0, 0, 3],
        option(3, &[]),
        option(8, &[]),
        option(5, &[]),
        option(6, &go("other")),
        option(7, &[0, 0, 0, 9, 1]),
        option(7, &vec![0; 20_000]),
        option(2, &[]),
    ];
    let mut tape = Tape::new(said.concat());
    serve(&mut tape, &shown(false, HeapDisk::new(0, 512))).unwrap();
    let mut heard = &tape.heard[18..];
    let mut kinds = Vec::new();
    while let Ok(head) = super::stream::get::<wire::AnswerHead>(&mut heard) {
        kinds.push((head.option.get(), head.kind.get()));
        heard = &heard[head.len.get() as usize..];
    }
    use wire::answer::{ACK, INVALID, SERVER, TOO_BIG, UNKNOWN, UNSUPPORTED};
    assert_eq!(
        kinds,
        [(3, SERVER), (3, ACK), (8, UNSUPPORTED), (5, UNSUPPORTED), (6, UNKNOWN), (7, INVALID), (7, TOO_BIG), (2, ACK)]
    );
}

/// A server at a socket in a directory, with one export `disk` of that image.
fn server(dir: &tempfile::TempDir, image: Arc<dyn BlockBackend>, writable: bool) -> (Arc<Exports>, Address) {
    let (events, _) = broadcast::channel(16);
    let exports = Arc::new(Exports::new(events.downgrade()));
    let address = Address::Unix(dir.path().join("nbd"));
    exports.open(&address, None).unwrap();
    exports.add(Export::new("e".into(), "disk".into(), "node".into(), writable, image)).unwrap();
    (exports, address)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// A disk by NBD is as the disk itself, by several threads at once too.
    #[test]
    fn a_disk_by_nbd_is_the_disk(calls in prop::collection::vec((0..4u8, 0..(1u64 << 21), 1..(1usize << 19)), 1..20)) {
        const SIZE: usize = 3 << 20;
        let dir = tempfile::tempdir().unwrap();
        let disk = HeapDisk::new(3, SIZE);
        let (exports, address) = server(&dir, disk.clone(), true);
        let nbd = Arc::new(NbdDisk::connect(&address, "disk", false).unwrap());
        prop_assert_eq!((nbd.size(), nbd.is_read_only()), (SIZE as u64, false));
        let mut model = vec![3; SIZE];
        for (kind, offset, len) in calls {
            let range = offset as usize..offset as usize + len;
            match kind {
                0 => {
                    let data: Vec<u8> = (0..len).map(|n| n as u8 ^ offset as u8).collect();
                    nbd.write_at(&data, offset).unwrap();
                    model[range].copy_from_slice(&data);
                }
                1 => {
                    nbd.write_zeroes(offset, len as u64, true).unwrap();
                    model[range].fill(0);
                }
                2 => nbd.flush().unwrap(),
                _ => {
                    let mut found = vec![0; len];
                    nbd.read_at(&mut found, offset).unwrap();
                    prop_assert!(found == model[range]);
                }
            }
        }
        thread::scope(|scope| {
            for part in 0..4u64 {
                let (nbd, model) = (&nbd, &model);
                scope.spawn(move || {
                    let mut found = vec![0; SIZE / 4];
                    nbd.read_at(&mut found, part * SIZE as u64 / 4).unwrap();
                    assert!(found == model[part as usize * SIZE / 4..][..SIZE / 4]);
                });
            }
        });
        prop_assert!(nbd.read_at(&mut [0; 512], SIZE as u64).is_err());
        exports.end();
        prop_assert!(disk.0.lock().unwrap()[..] == model[..]);
        let why = with_causes(&nbd.flush().unwrap_err());
        prop_assert!(why.contains("nbd+unix://") && why.contains("closed the connection"), "{}", why);
    }

    /// A client that says anything is served or dropped, and touches no export that is read alone.
    #[test]
    fn any_client(greets in any::<bool>(), bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let handshake = if greets { golden("nbd/client.hex")[..32].to_vec() } else { Vec::new() };
        let disk = HeapDisk::new(0x11, 4096);
        let mut tape = Tape::new([handshake, bytes].concat());
        let _ = serve(&mut tape, &shown(false, disk.clone()));
        prop_assert!(disk.0.lock().unwrap().iter().all(|byte| *byte == 0x11));
    }

    /// A server that says anything is taken for one, or refused in one line.
    #[test]
    fn any_server(at in 0..120usize, byte in any::<u8>(), end in 0..130usize) {
        let mut answers = golden("nbd/server.hex");
        answers[at] = byte;
        answers.truncate(end);
        if let Err(error) = negotiate(&mut Tape::new(answers), "disk") {
            let text = error.to_string();
            prop_assert_eq!(crate::cli::one_line(&text), text);
        }
    }
}

#[test]
fn a_door_has_its_rules() {
    let dir = tempfile::tempdir().unwrap();
    let (exports, address) = server(&dir, HeapDisk::new(1, 4096), false);
    assert!(matches!(exports.open(&address, None), Err(ExportError::Running)));
    let again = Export::new("f".into(), "disk".into(), "node".into(), false, HeapDisk::new(1, 512));
    assert!(matches!(exports.add(again), Err(ExportError::Taken(_))));
    assert!(NbdDisk::connect(&address, "disk", false).is_err(), "it may only be read");
    let why = with_causes(&NbdDisk::connect(&address, "other", true).unwrap_err());
    assert!(why.contains("no such export"), "{why}");
    let nbd = NbdDisk::connect(&address, "disk", true).unwrap();
    assert!(matches!(exports.remove("e", false), Err(ExportError::InUse(_))));
    assert_eq!(exports.of_node("node", true), None);
    assert_eq!(exports.of_node("node", false), Some("e".into()));
    // A guest that arrives takes what may be written alone.
    exports.guest_arrives();
    nbd.read_at(&mut [0; 512], 0).unwrap();
    exports.remove("e", true).unwrap();
    assert!(nbd.read_at(&mut [0; 512], 0).is_err());
    exports.close().unwrap();
    assert!(matches!(exports.close(), Err(ExportError::NotRunning)));
    assert!(!dir.path().join("nbd").exists());
}

#[test]
fn who_stalls_or_talks_nonsense_keeps_nobody_else_out() {
    use std::os::unix::net::UnixStream;
    let dir = tempfile::tempdir().unwrap();
    let (exports, address) = server(&dir, HeapDisk::new(1, 4096), true);
    let silent: Vec<_> = (0..8).map(|_| UnixStream::connect(dir.path().join("nbd")).unwrap()).collect();
    let mut loud = UnixStream::connect(dir.path().join("nbd")).unwrap();
    loud.write_all(&[0xff; 4096]).unwrap();
    // It is dropped: its end is read, or that somebody has cut it.
    let _ = io::copy(&mut loud, &mut io::sink());
    let nbd = NbdDisk::connect(&address, "disk", false).unwrap();
    nbd.write_at(&[2; 512], 0).unwrap();
    drop(silent);
    exports.end();
}

#[test]
fn a_call_that_nobody_answers_is_interrupted() {
    use std::os::unix::net::UnixListener;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        // The handshake's answers, and none to a request.
        stream.write_all(&golden("nbd/server.hex")[..104]).unwrap();
        let _ = io::copy(&mut stream, &mut io::sink());
    });
    let nbd = Arc::new(NbdDisk::connect(&Address::Unix(path), "disk", false).unwrap());
    let asking = {
        let nbd = nbd.clone();
        thread::spawn(move || nbd.flush())
    };
    thread::sleep(Duration::from_millis(10));
    nbd.interrupt();
    let why = with_causes(&asking.join().unwrap().unwrap_err());
    assert!(why.contains("given up"), "{why}");
    server.join().unwrap();
}

#[test]
fn an_image_that_was_elsewhere_is_claimed_to_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, vec![0; 4096]).unwrap();
    let image = open(&ImageSpec { unclaimed: true, ..ImageSpec::new(&path) }).unwrap();
    let (exports, address) = server(&dir, image.clone(), true);
    let Err(error) = open(&ImageSpec::new(&path)) else { panic!("it is locked") };
    assert!(with_causes(&error).contains("in use"));
    NbdDisk::connect(&address, "disk", false).unwrap().write_at(&[5; 512], 512).unwrap();
    exports.guest_arrives();
    // It is this one's, and what was written is there.
    image.claim().unwrap();
    let mut found = [0; 512];
    image.read_at(&mut found, 512).unwrap();
    assert_eq!(found, [5; 512]);
    assert!(matches!(NbdDisk::connect(&address, "disk", false), Err(BlockError::Nbd { .. })));
    exports.end();
}
