//! What the kernel is asked for, call by call.

use std::path::Path;

use super::super::Buffer;
use super::*;
use crate::block::ImageSpec;
use crate::block::tests::open_anew;

const SECTOR: u64 = 512;

fn job(token: usize, operation: Operation, sector: u64, bytes: &[u8]) -> Job {
    let mut buffer = Buffer::default();
    buffer.front(bytes.len()).copy_from_slice(bytes);
    Job { token, operation, offset: sector * SECTOR, len: bytes.len() as u64, buffer }
}

/// A disk of so many sectors, each full of its number, and its queue; none where a test of that name can't have one.
fn disk(test: &str, dir: &tempfile::TempDir, sectors: u8) -> Option<(std::path::PathBuf, UringQueue)> {
    let path = dir.path().join("disk");
    std::fs::write(&path, (0..sectors).flat_map(|n| [n; SECTOR as usize]).collect::<Vec<_>>()).unwrap();
    let queue = queue(test, &path, false)?;
    Some((path, queue))
}

fn queue(test: &str, path: &Path, direct: bool) -> Option<UringQueue> {
    if IoUring::new(1).is_err() {
        testbed::skip(test, "this kernel has no io_uring");
        return None;
    }
    let image = open_anew(&ImageSpec { direct, ..ImageSpec::new(path) });
    Some(UringQueue::new(image.raw().unwrap(), 128).unwrap())
}

/// The calls that are made of what was added.
fn calls(queue: &mut UringQueue) -> usize {
    queue.fill();
    queue.pushed
}

/// Waits for so many jobs; what came back, in the order of tokens.
fn wait(queue: &mut UringQueue, count: usize) -> Vec<Done> {
    let mut done = Vec::new();
    while done.len() < count {
        queue.commit().unwrap();
        if queue.in_kernel > 0 {
            queue.enter(1).unwrap();
        }
        queue.take(&mut done);
    }
    done.sort_by_key(|done| done.token);
    done
}

#[test]
fn neighbours_are_one_call_in_whatever_order_they_come() {
    let dir = tempfile::tempdir().unwrap();
    let test = "neighbours_are_one_call_in_whatever_order_they_come";
    let Some((path, mut queue)) = disk(test, &dir, 64) else { return };
    for n in 0..32 {
        queue.add(job(n, Operation::Read, n as u64 * 13 % 32, &[0xee; SECTOR as usize]));
    }
    assert_eq!(calls(&mut queue), 1);
    for mut done in wait(&mut queue, 32) {
        assert!(done.result.is_ok());
        assert_eq!(done.buffer.front(512), [(done.token * 13 % 32) as u8; 512]);
    }
    for n in 0..8 {
        queue.add(job(n, Operation::Write, 40 + n as u64, &[0x80 | n as u8; 512]));
        queue.add(job(8 + n, Operation::Read, 48 + n as u64, &[0; 512]));
    }
    queue.add(job(16, Operation::Write, 60, &[0xff; 1024]));
    queue.add(job(17, Operation::Flush, 0, &[]));
    assert_eq!(calls(&mut queue), 4, "what is read, what is written in two places, the flush");
    assert!(wait(&mut queue, 18).iter().all(|done| done.result.is_ok()));
    let bytes = std::fs::read(path).unwrap();
    let wanted = |sector| match sector {
        40..48 => 0x80 | (sector - 40),
        60 | 61 => 0xff,
        _ => sector,
    };
    assert!(bytes.chunks(512).zip(0..).all(|(found, n)| found == [wanted(n); 512]));
}

#[test]
fn a_call_has_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let Some(mut queue) = queue("a_call_has_an_end", &path, true) else { return };
    for n in 0..33 {
        queue.add(job(n, Operation::Read, n as u64 * 128, &[0xee; 64 << 10]));
    }
    queue.add(job(33, Operation::Read, 10_000, &[0xee; 2 << 20]));
    assert_eq!(calls(&mut queue), 4, "1 MiB twice, what is left, and one that is larger by itself");
    assert!(wait(&mut queue, 34).iter_mut().all(|done| done.result.is_ok() && done.buffer.front(1)[0] == 0));
}

#[test]
fn an_error_is_its_own_job_s() {
    let dir = tempfile::tempdir().unwrap();
    let Some((path, mut queue)) = disk("an_error_is_its_own_job_s", &dir, 16) else { return };
    std::fs::File::options().write(true).open(path).unwrap().set_len(5 * SECTOR + 100).unwrap();
    for n in 0..16 {
        queue.add(job(n, Operation::Read, n as u64, &[0xee; SECTOR as usize]));
    }
    assert_eq!(calls(&mut queue), 1);
    for mut done in wait(&mut queue, 16) {
        assert_eq!(done.result.is_ok(), done.token < 5, "{done:?}");
        assert!(done.token >= 5 || done.buffer.front(512) == [done.token as u8; 512]);
    }
    // Nothing is written where this process has no right to, and each job hears of it.
    let read_only = std::fs::File::open("/dev/null").unwrap();
    let file = queue.file.file().as_raw_fd();
    // SAFETY: both descriptors are this test's own.
    assert_eq!(unsafe { libc::dup2(read_only.as_raw_fd(), file) }, file);
    for n in 0..4 {
        queue.add(job(n, Operation::Write, n as u64, &[0; SECTOR as usize]));
    }
    assert_eq!(calls(&mut queue), 1);
    assert!(wait(&mut queue, 4).iter().all(|done| done.result.is_err()));
}
