//! NBD with a peer that says anything: a client before the server, a server before the client.
#![no_main]

use std::error::Error;
use std::io::{self, Cursor, Read, Write};
use std::iter::successors;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use fuzz::is_one_line;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::block::{BlockBackend, BlockError};
use soc_vmm::nbd::wire::{
    ANSWER_MAGIC, AnswerHead, FIXED_NEWSTYLE, Greeting, MAGIC, OPTION_MAGIC, OptionHead, Reply, Request,
};
use soc_vmm::nbd::{Export, Gallery, NbdDisk, Socket, Stream, serve};
use zerocopy::IntoBytes;

/// Bytes of the disk.
const SIZE: u64 = 64 << 10;

/// A disk that is asked for what it has.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    writable: bool,
}

impl Disk {
    fn check(&self, offset: u64, len: u64) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= SIZE), "{len} bytes at {offset}");
    }
}

impl BlockBackend for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.check(offset, buf.len() as u64);
        buf.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        assert!(self.writable);
        self.check(offset, data.len() as u64);
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        assert!(self.writable);
        self.check(offset, len);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<(), BlockError> {
        assert!(self.writable);
        self.check(offset, len);
        self.bytes.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

struct Shown(Export);

impl Gallery for Shown {
    fn find(&self, name: &str) -> Option<Export> {
        (name == self.0.name).then(|| self.0.clone())
    }

    fn names(&self) -> Vec<String> {
        vec![self.0.name.clone()]
    }
}

struct Tape<'a> {
    said: Cursor<&'a [u8]>,
    heard: usize,
}

impl Read for Tape<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.said.read(buf)
    }
}

impl Write for Tape<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.heard += buf.len();
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Tape<'_> {}

#[derive(Arbitrary, Debug)]
enum Said<'a> {
    /// Any bytes.
    Bytes(&'a [u8]),
    /// An option, or an answer to one.
    Option { option: u8, kind: u32, len: Option<u32>, bytes: &'a [u8] },
    /// The option that takes the disk.
    Go,
    /// A request, or the reply to one.
    Request { command: u8, flags: u8, cookie: u8, offset: u32, len: u32, error: u8 },
    /// A sector.
    Sector(u8),
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    serves: bool,
    writable: bool,
    flags: Option<u32>,
    said: Vec<Said<'a>>,
    asked: Vec<(u8, u16, u16)>,
}

fn name(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes, &1u16.to_be_bytes(), &3u16.to_be_bytes()].concat()
}

fn bytes(input: &Input<'_>) -> Vec<u8> {
    let flags = input.flags.unwrap_or(u32::from(FIXED_NEWSTYLE));
    let mut all = if input.serves {
        flags.to_be_bytes().to_vec()
    } else {
        let greeting =
            Greeting { magic: MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: (flags as u16).into() };
        greeting.as_bytes().to_vec()
    };
    for said in &input.said {
        match said {
            Said::Bytes(bytes) => all.extend(*bytes),
            Said::Option { option, kind, len, bytes } => {
                let len = len.unwrap_or(bytes.len() as u32);
                if input.serves {
                    all.extend(OptionHead::new((*option).into(), len).as_bytes());
                } else {
                    let head = AnswerHead {
                        magic: ANSWER_MAGIC.into(),
                        option: 7.into(),
                        kind: (*kind).into(),
                        len: len.into(),
                    };
                    all.extend(head.as_bytes());
                }
                all.extend(*bytes);
            }
            Said::Go if input.serves => {
                let wish = name(b"disk");
                all.extend(OptionHead::new(7, wish.len() as u32).as_bytes());
                all.extend(wish);
            }
            Said::Go => {
                let told = [&0u16.to_be_bytes()[..], &SIZE.to_be_bytes(), &0x6du16.to_be_bytes()].concat();
                all.extend(AnswerHead::new(7, 3, told.len() as u32).as_bytes());
                all.extend(told);
                all.extend(AnswerHead::new(7, 1, 0).as_bytes());
            }
            Said::Request { command, flags, cookie, offset, len, error } => {
                if input.serves {
                    let request =
                        Request::new((*command).into(), (*flags).into(), (*cookie).into(), (*offset).into(), *len);
                    all.extend(request.as_bytes());
                } else {
                    all.extend(Reply::new((*error).into(), (*cookie).into()).as_bytes());
                }
            }
            Said::Sector(byte) => all.extend([*byte; 512]),
        }
    }
    all
}

fuzz_target!(|input: Input<'_>| {
    let bytes = bytes(&input);
    if input.serves {
        let image = Arc::new(Disk { bytes: Mutex::new(vec![7; SIZE as usize]), writable: input.writable });
        let export = Export::new("e".into(), "disk".into(), "node".into(), input.writable, image);
        let mut tape = Tape { said: Cursor::new(&bytes), heard: 0 };
        if let Err(error) = serve(&mut tape, &Shown(export)) {
            assert!(is_one_line(&error.to_string()), "{error}");
        }
        return;
    }
    let (mut ours, theirs) = UnixStream::pair().expect("two sockets");
    // What a server says fits what a socket holds; the rest is cut off.
    ours.write_all(&bytes[..bytes.len().min(64 << 10)]).expect("room");
    ours.shutdown(std::net::Shutdown::Write).expect("an end");
    let socket = Socket::try_from(theirs).expect("a socket");
    let one_line = |error: &BlockError| {
        let causes = successors(Some(error as &dyn Error), |&error| error.source());
        causes.for_each(|cause| assert!(is_one_line(&cause.to_string()), "{error:?}"));
    };
    match NbdDisk::over("nbd".into(), socket, "disk", false) {
        Ok(disk) => {
            let size = disk.size();
            assert!(size > 0 && size.is_multiple_of(512));
            for (kind, offset, len) in input.asked.iter().take(8) {
                let (offset, len) = (u64::from(*offset) * 512, usize::from(*len % 2048));
                let done = match kind % 4 {
                    0 => disk.read_at(&mut vec![0; len], offset),
                    1 => disk.write_at(&vec![0; len], offset),
                    2 => disk.write_zeroes(offset, len as u64, true),
                    _ => disk.flush(),
                };
                if let Err(error) = done {
                    one_line(&error);
                }
            }
        }
        Err(error) => one_line(&error),
    }
});
