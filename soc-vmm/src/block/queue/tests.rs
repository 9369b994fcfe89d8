//! Both kinds of queue, on files.

use std::collections::HashMap;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;

use super::*;
use crate::block::ImageSpec;
use crate::block::tests::open_anew;

const DEPTH: usize = 32;

/// Adds the jobs, and waits for all of them: what came back by token, and how often anything was handed over.
fn carry_out(queue: &mut dyn BlockQueue, jobs: Vec<Job>) -> (HashMap<usize, Done>, usize) {
    let count = jobs.len();
    jobs.into_iter().for_each(|job| queue.add(job));
    let (mut done, mut handed) = (Vec::new(), 0);
    loop {
        queue.take(&mut done);
        if done.len() == count {
            return (done.into_iter().map(|done| (done.token, done)).collect(), handed);
        }
        if queue.commit().unwrap() {
            handed += 1;
        } else {
            poll(&mut [PollFd::new(queue.fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        }
    }
}

fn job(token: usize, operation: Operation, offset: u64, bytes: &[u8]) -> Job {
    let mut buffer = Buffer::default();
    buffer.front(bytes.len()).copy_from_slice(bytes);
    Job { token, operation, offset, len: bytes.len() as u64, buffer }
}

/// A queue of its own kind on a file.
fn queue(path: &Path, aio: Aio, direct: bool) -> Box<dyn BlockQueue> {
    let image = open_anew(&ImageSpec { direct, ..ImageSpec::new(path) });
    open_queue(image, aio, DEPTH).unwrap()
}

fn file(dir: &tempfile::TempDir, bytes: &[u8]) -> std::path::PathBuf {
    let path = dir.path().join("disk");
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn what_is_added_together_is_one_call() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, &[7; DEPTH * 512]);
    for aio in [Aio::IoUring, Aio::Threads] {
        let mut queue = queue(&path, aio, false);
        let reads = (0..DEPTH).map(|n| job(n, Operation::Read, n as u64 * 512, &[0; 512])).collect();
        let (mut done, handed) = carry_out(&mut *queue, reads);
        assert_eq!((done.len(), handed), (DEPTH, 1));
        for done in done.values_mut() {
            done.result.as_ref().unwrap();
            assert_eq!(done.buffer.front(512), [7; 512]);
        }
    }
}

#[test]
fn what_is_not_there_is_an_error_and_odd_ends_are_zeros() {
    let dir = tempfile::tempdir().unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let path = file(&dir, &[7; 1000]);
        let mut queue = queue(&path, aio, false);
        let jobs = vec![
            job(0, Operation::Read, 512, &[0xee; 512]),
            job(1, Operation::Read, 1024, &[0; 512]),
            job(2, Operation::Write, u64::MAX - 511, &[0; 512]),
            job(3, Operation::Flush, 0, &[]),
            job(4, Operation::Read, 0, &[]),
        ];
        let (mut done, _) = carry_out(&mut *queue, jobs);
        let odd = done.get_mut(&0).unwrap();
        odd.result.as_ref().unwrap();
        assert_eq!(odd.buffer.front(512), [[7; 488].as_slice(), &[0; 24]].concat());
        for (token, good) in [(1, false), (2, false), (3, true), (4, true)] {
            assert_eq!(done[&token].result.is_ok(), good, "{token}");
        }
        std::fs::File::options().write(true).open(&path).unwrap().set_len(600).unwrap();
        let (done, _) = carry_out(&mut *queue, vec![job(0, Operation::Read, 512, &[0; 512])]);
        let text = crate::cli::with_causes(done[&0].result.as_ref().unwrap_err());
        assert_eq!(
            text,
            format!("can't use disk image {}: it is shorter than when it was opened: restore it", path.display())
        );
    }
}

#[test]
fn a_queue_that_is_dropped_waits_for_what_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, &vec![0; 4 << 20]);
    for (byte, aio) in [(1, Aio::IoUring), (2, Aio::Threads)] {
        let mut queue = queue(&path, aio, false);
        let data = vec![byte; 128 << 10];
        for n in 0..DEPTH {
            queue.add(job(n, Operation::Write, (n * data.len()) as u64, &data));
        }
        queue.commit().unwrap();
        drop(queue);
        let before = std::fs::read(&path).unwrap();
        // Threads give up what none of them has begun; nothing is written in part, or later.
        assert!(before.chunks(data.len()).all(|part| part.iter().all(|b| *b == part[0])));
        assert!(aio == Aio::Threads || before.iter().all(|b| *b == byte));
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}

/// A job on one of 16 places of 8 sectors each, no two of a round on the same.
#[derive(Clone, Debug)]
struct Step {
    operation: Operation,
    first: u64,
    count: u64,
    byte: u8,
}

fn round() -> impl Strategy<Value = Vec<Step>> {
    let operation = prop_oneof![
        4 => Just(Operation::Read),
        4 => Just(Operation::Write),
        1 => Just(Operation::Flush),
        1 => Just(Operation::Discard),
        2 => any::<bool>().prop_map(|may_unmap| Operation::Zero { may_unmap }),
    ];
    let step = (operation, 0u64..8, 1u8..).prop_flat_map(|(operation, first, byte)| {
        // Whole places are neighbours.
        let place = prop_oneof![Just((0, 8)), (0..=8 - first).prop_map(move |count| (first, count))];
        place.prop_map(move |(first, count)| Step { operation, first, count, byte })
    });
    proptest::collection::vec(step, 16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn all_kinds_do_the_same(rounds in proptest::collection::vec(round(), 1..6)) {
        let dir = tempfile::tempdir().unwrap();
        let initial = vec![0x5a; 16 * 8 * 512 - 100];
        for (aio, direct) in [(Aio::IoUring, false), (Aio::Threads, false), (Aio::IoUring, true), (Aio::Threads, true)] {
            let mut model = initial.clone();
            model.resize(16 * 8 * 512, 0);
            let path = file(&dir, &initial);
            let mut queue = queue(&path, aio, direct);
            for round in &rounds {
                let place = |n: usize, step: &Step| {
                    let at = (n * 8 + step.first as usize) * 512;
                    at..at + step.count as usize * 512
                };
                let jobs = round.iter().enumerate().map(|(n, step)| {
                    let range = place(n, step);
                    let (offset, len) = (range.start as u64, range.len());
                    let bytes = if step.operation == Operation::Write { vec![step.byte; len] } else { vec![0xee; len] };
                    job(n, step.operation, offset, &bytes)
                });
                let (mut done, _) = carry_out(&mut *queue, jobs.collect());
                for (n, step) in round.iter().enumerate() {
                    let range = place(n, step);
                    let done = done.get_mut(&n).unwrap();
                    prop_assert!(done.result.is_ok(), "{:?}: {:?}", step, done.result);
                    match step.operation {
                        Operation::Read => prop_assert_eq!(&*done.buffer.front(range.len()), &model[range]),
                        Operation::Write => model[range].fill(step.byte),
                        Operation::Zero { .. } => model[range].fill(0),
                        // It may hold anything now: it is written again.
                        Operation::Discard => {
                            let again = job(n, Operation::Write, range.start as u64, &model[range]);
                            let (done, _) = carry_out(&mut *queue, vec![again]);
                            prop_assert!(done[&n].result.is_ok());
                        }
                        Operation::Flush => {}
                    }
                }
            }
            drop(queue);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.resize(model.len(), 0);
            prop_assert!(bytes == model);
        }
    }
}
