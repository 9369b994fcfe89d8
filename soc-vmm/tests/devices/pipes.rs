//! The byte queues' task side.

use std::sync::Arc;
use std::time::Duration;

use soc_vmm::devices::{Closed, input_pipe, output_pipe};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::rig::Wakes;

const SOON: Duration = Duration::from_secs(10);

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

#[test]
fn output_reaches_a_waiting_reader() {
    let (mut device, mut reader) = output_pipe(4, Arc::new(Wakes::default()));
    runtime().block_on(async {
        let task = tokio::spawn(async move {
            let mut all = Vec::new();
            while reader.read(&mut all).await > 0 {}
            all
        });
        for byte in 0..100u8 {
            while !device.push(byte) {
                tokio::task::yield_now().await;
            }
        }
        drop(device);
        let all = timeout(SOON, task).await.unwrap().unwrap();
        assert_eq!(all, (0..100).collect::<Vec<u8>>());
    });
}

#[test]
fn a_refused_device_is_woken_once_there_is_room() {
    let wakes = Arc::new(Wakes::default());
    let (mut device, mut reader) = output_pipe(2, wakes.clone());
    assert!(device.push(1) && device.push(2));
    let mut all = Vec::new();
    reader.try_read(&mut all);
    assert_eq!(wakes.take(), 0, "it was not refused");
    assert!(device.push(3) && device.push(4) && !device.push(5));
    reader.try_read(&mut all);
    assert_eq!((wakes.take(), all.len()), (1, 4));
    reader.try_read(&mut all);
    assert_eq!(wakes.take(), 0);
}

#[test]
fn input_waits_for_room_and_hears_of_the_end() {
    let (mut writer, mut device) = input_pipe(3, Arc::new(Wakes::default()));
    runtime().block_on(async {
        let task = tokio::spawn(async move {
            writer.write_all(b"ten bytes!").await.unwrap();
            writer.write_all(b"and more").await
        });
        let mut got = std::collections::VecDeque::new();
        let all = timeout(SOON, async {
            while got.len() < 10 {
                device.take(2, &mut got);
                assert!(got.len() <= 10 || got.len() <= 18);
                tokio::task::yield_now().await;
            }
        });
        all.await.unwrap();
        assert!(got.iter().zip(b"ten bytes!and more").all(|(got, sent)| got == sent));
        drop(device);
        assert_eq!(timeout(SOON, task).await.unwrap().unwrap(), Err(Closed));
    });
}
