//! Guests in files in which pages have places.

mod rig;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use migration::stream::{PAGE, PlacedHead, StreamError};
use migration::{After, Connection, Control, MigrationError, Parameters, Phase, Summary, receive, send};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rig::roads::{into, once, out_of, unix};
use rig::{Destination, Halts, Ram, Source, Writer};
use tempfile::{tempdir, tempfile};

const PAGES: [u64; 2] = [2000, 70];

fn mapped() -> Parameters {
    Parameters { mapped: true, ..Parameters::default() }
}

fn saved(source: &Source, file: &File, parameters: Parameters) -> Result<Summary, MigrationError> {
    send(source, &mut into(file), &Control::new(parameters))
}

/// A guest in a file, as it was when it left.
fn filled() -> (Source, File) {
    let (source, file) = (Source::new(Ram::filled(&PAGES)), tempfile().unwrap());
    saved(&source, &file, mapped()).unwrap();
    (source, file)
}

fn restored(destination: &Destination, file: &File, start: u64, pages_first: bool) -> Result<Summary, MigrationError> {
    let control = Control::new(Parameters { pages_first, ..Parameters::default() });
    receive(destination, &mut out_of(file, start), &control)
}

/// Who can't wait for pages reads all of them before the guest starts, and so does who is told to.
#[test]
fn pages_come_first_or_as_they_are_touched() {
    let (source, file) = filled();
    for (waits, pages_first) in [(false, false), (true, true), (true, false)] {
        let destination = Destination::like(&source);
        let destination = if waits { destination.waiting() } else { destination };
        let summary = thread::scope(|scope| {
            let guest = scope.spawn(|| {
                if waits {
                    destination.touch_all(&source.ram);
                }
            });
            let restored = restored(&destination, &file, 0, pages_first);
            guest.join().unwrap();
            restored.unwrap()
        });
        let there = PAGES.iter().sum::<u64>();
        assert_eq!(summary.progress.total, there * PAGE);
        assert_eq!(summary.progress.remaining, 0);
        if waits {
            destination.check_touched(&source.ram);
        } else {
            assert_eq!(source.ram.differs(&destination.ram), []);
        }
    }
    assert!(source.gone.load(Ordering::Relaxed));
}

/// Whatever is before it in the file stays, whatever was behind goes, and what is restored is the last that the guest wrote.
#[test]
fn a_page_that_is_written_again_is_there_once_and_zeros_take_no_room() {
    for start in [0, 4096, 5000] {
        let source = Source::new(Ram::new(&[4000, 5]));
        let file = tempfile().unwrap();
        file.write_all_at(&vec![0xaa; 40 << 20], 0).unwrap();
        let parameters =
            Parameters { max_bandwidth: 20 << 20, downtime_limit: Duration::ZERO, most_rounds: Some(5), ..mapped() };
        let writer = Writer { pages: 300, burst: 1000, sleep: Duration::from_millis(1) };
        let summary = thread::scope(|scope| {
            let _halts = Halts(&source);
            scope.spawn(|| source.write_on(writer));
            while source.writes() < 5000 {
                thread::sleep(Duration::from_millis(1));
            }
            std::io::Seek::seek(&mut &file, std::io::SeekFrom::Start(start)).unwrap();
            saved(&source, &file, parameters).unwrap()
        });
        assert!(summary.progress.normal_pages > 600, "{:?}", summary.progress);
        let metadata = file.metadata().unwrap();
        assert!(metadata.len() < start + (4100 << 12), "{}", metadata.len());
        // Its blocks are those of the pages that the guest wrote, and of what is around.
        assert!(metadata.blocks() * 512 < (300 + 30) * PAGE, "{} blocks", metadata.blocks());
        let destination = Destination::like(&source).waiting();
        restored(&destination, &file, start, false).unwrap();
        source.check_counts(&destination.ram);
        let mut before = vec![0; start as usize];
        file.read_exact_at(&mut before, 0).unwrap();
        assert!(before.iter().all(|byte| *byte == 0xaa));
    }
}

#[test]
fn a_snapshot_s_guest_goes_on_and_others_run_from_it_at_once() {
    for (after, rounds) in [(After::GoesOn, Some(0)), (After::GoesOn, Some(1)), (After::StandsStill, None)] {
        let (source, file) = (Source::new(Ram::filled(&PAGES)), tempfile().unwrap());
        saved(&source, &file, Parameters { after, most_rounds: rounds, ..mapped() }).unwrap();
        assert!(source.runs() && !source.gone.load(Ordering::Relaxed));
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let twin = Destination::like(&source).waiting();
                    restored(&twin, &file, 0, false).unwrap();
                    assert_eq!(source.ram.differs(&twin.ram), []);
                });
            }
        });
        // And once more, over the same file.
        std::io::Seek::rewind(&mut &file).unwrap();
        saved(&source, &file, Parameters { after, ..mapped() }).unwrap();
    }
}

/// The file is all there is of it then.
#[test]
fn a_guest_that_can_t_go_on_is_whole_in_the_file() {
    let (source, file) = (Source::new(Ram::filled(&PAGES)), tempfile().unwrap());
    *source.fails.write().unwrap() = Some("resume");
    let error = saved(&source, &file, Parameters { after: After::GoesOn, ..mapped() }).unwrap_err();
    assert!(matches!(error, MigrationError::StandsStill { .. }), "{error:?}");
    assert!(!source.runs());
    let twin = Destination::like(&source).waiting();
    restored(&twin, &file, 0, false).unwrap();
    assert_eq!(source.ram.differs(&twin.ram), []);
}

#[test]
fn what_is_not_whole_is_no_guest() {
    let (source, file) = filled();
    let len = file.metadata().unwrap().len();
    let refused = |file: &File| {
        let destination = Destination::like(&source).waiting();
        let error = restored(&destination, file, 0, false).unwrap_err();
        assert!(!destination.runs());
        error
    };
    // Somebody died before the head was written.
    let mut head = [0; PlacedHead::BYTES];
    file.read_exact_at(&mut head, PlacedHead::AT).unwrap();
    file.write_all_at(&PlacedHead { records: None }.bytes(), PlacedHead::AT).unwrap();
    let error = refused(&file);
    assert!(matches!(error, MigrationError::Stream { source: StreamError::Unfinished, .. }), "{error:?}");
    file.write_all_at(&head, PlacedHead::AT).unwrap();
    for end in [0, 20, 60, 5000, len / 2, len - 1] {
        let cut = tempfile().unwrap();
        let mut bytes = vec![0; end as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        cut.write_all_at(&bytes, 0).unwrap();
        let error = refused(&cut);
        assert!(matches!(error, MigrationError::Stream { source: StreamError::Truncated, .. }), "{end}: {error:?}");
    }
}

/// Before the guest starts if all pages are read first; or it is lost, and somebody says why.
#[test]
fn an_altered_page_is_seen() {
    let (source, file) = filled();
    let at = 4096 + 6 * PAGE + 77;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let destination = Destination::like(&source).waiting();
    let error = restored(&destination, &file, 0, true).unwrap_err();
    assert!(matches!(error, MigrationError::DamagedPage { region: 0, page: 6 }), "{error:?}");
    assert!(!destination.runs());
    let destination = Destination::like(&source).waiting();
    let error = restored(&destination, &file, 0, false).unwrap_err();
    assert!(matches!(error, MigrationError::Unreadable { pages: 1.., .. }), "{error:?}");
    assert!(destination.runs() && error.one_line().contains("page 6 of region 0 is damaged"), "{error:?}");
}

#[test]
fn pages_have_places_in_files_alone() {
    let source = Source::new(Ram::filled(&PAGES));
    let (reader, writer) = std::io::pipe().unwrap();
    let mut pipe = move |_| Connection::into_file(File::from(std::os::fd::OwnedFd::from(writer.try_clone()?)));
    let error = send(&source, &mut pipe, &Control::new(mapped())).unwrap_err();
    assert!(matches!(error, MigrationError::NoPlace), "{error:?}");
    let (mut socket, _accepts) = unix();
    let error = send(&source, &mut socket, &Control::new(mapped())).unwrap_err();
    assert!(matches!(error, MigrationError::NoPlace), "{error:?}");
    let parameters = Parameters { after: After::GoesOn, ..Parameters::default() };
    let error = send(&source, &mut socket, &Control::new(parameters)).unwrap_err();
    assert!(matches!(error, MigrationError::Twins), "{error:?}");
    let error = Parameters { zstd: Some(1), ..mapped() }.check().unwrap_err();
    assert!(error.to_string().contains("not compressed"), "{error}");
    assert!(source.runs());
    // Nor does anybody restore it from a pipe.
    let (_, file) = filled();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    drop(reader);
    let connection = Connection {
        reader: Box::new(std::io::Cursor::new(bytes)),
        writer: Box::new(std::io::sink()),
        cut: std::sync::Arc::new(|| ()),
        answers: false,
        others_come: false,
        place: None,
    };
    let control = Control::new(Parameters::default());
    let error = receive(&Destination::like(&source), &mut once(connection), &control).unwrap_err();
    assert!(matches!(error, MigrationError::NoPlace), "{error:?}");
    assert!(matches!(control.phase(), Phase::Failed(_)));
}

/// Nobody would find it there: the guest goes on.
#[test]
fn a_file_that_somebody_removes_or_replaces_meanwhile_keeps_no_guest() {
    let spoil: [fn(&Path); 2] = [
        |path| std::fs::remove_file(path).unwrap(),
        |path| std::fs::rename(path.with_extension("other"), path).unwrap(),
    ];
    for (mapped, spoil) in [true, false].into_iter().flat_map(|mapped| spoil.map(|spoil| (mapped, spoil))) {
        let dir = tempdir().unwrap();
        let path = dir.path().join("saved");
        let file = File::create(&path).unwrap();
        std::fs::write(path.with_extension("other"), "precious").unwrap();
        let source = Source::new(Ram::filled(&PAGES));
        let control = Control::new(Parameters { mapped, pause_before_switchover: true, ..Parameters::default() });
        let sent = thread::scope(|scope| {
            let sender = scope.spawn(|| send(&source, &mut into(&file), &control));
            while control.phase() != Phase::PreSwitchover {
                thread::sleep(Duration::from_millis(1));
            }
            spoil(&path);
            assert!(control.go_on());
            sender.join().unwrap()
        });
        assert!(sent.unwrap_err().one_line().contains("meanwhile"));
        assert!(source.runs() && !source.gone.load(Ordering::Relaxed));
    }
}

/// As where the disk is full: the guest goes on.
#[test]
fn a_file_that_can_t_grow_is_no_end() {
    let source = Source::new(Ram::filled(&PAGES));
    let file = File::from(memfd_create("sealed", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
    for rounds in [None, Some(0)] {
        let error = saved(&source, &file, Parameters { most_rounds: rounds, ..mapped() }).unwrap_err();
        assert!(error.one_line().contains("permitted"), "{error:?}");
        assert!(source.runs() && !source.gone.load(Ordering::Relaxed));
    }
}
