//! Threads that stand for vCPUs where a control plane wants to see one for each.
//!
//! libvirt keeps a vCPU by its thread: it shows, confines and pins that, and refuses `vcpuinfo` without. A vCPU of ours runs on the host, where
//! libvirt isn't; on this system nothing is done for one vCPU alone. So there is a thread that sleeps for each that was asked for: what is said of it
//! is true of it, and the time that it takes, none, is what the vCPU costs here. Where vCPUs run is said by `--cpu-affinity`.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, park};

use nix::unistd::gettid;

/// A sleeping thread's stack.
const STACK: usize = 16 << 10;

/// The threads by vCPU. Cheap to clone: all clones are one.
#[derive(Clone, Debug, Default)]
pub struct StandIns(Arc<Mutex<BTreeMap<usize, i32>>>);

impl StandIns {
    /// The id of the thread that stands for a vCPU; it stays as long as this process.
    ///
    /// # Errors
    /// There can be no more threads.
    pub fn of(&self, vcpu: usize) -> io::Result<i32> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tid) = all.get(&vcpu) {
            return Ok(*tid);
        }
        let (sender, receiver) = channel();
        let sleep = move || {
            // Who asks waits for it.
            let _ = sender.send(gettid().as_raw());
            loop {
                park();
            }
        };
        Builder::new().name(format!("CPU {vcpu}")).stack_size(STACK).spawn(sleep)?;
        let tid = receiver.recv().map_err(io::Error::other)?;
        all.insert(vcpu, tid);
        Ok(tid)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn each_vcpu_has_a_thread_of_this_process_s_own() {
        let stand_ins = StandIns::default();
        let [first, second] = [0, 1].map(|vcpu| stand_ins.of(vcpu).unwrap());
        assert_ne!(first, second);
        assert_eq!(stand_ins.of(0).unwrap(), first);
        assert!([first, second].iter().all(|tid| Path::new(&format!("/proc/self/task/{tid}")).exists()));
        assert_ne!(first, std::process::id() as i32);
    }
}
