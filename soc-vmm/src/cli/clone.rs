//! `soc-vmm clone`: a VM whose guest is another one's as it is just now, by a file that is there for that long alone.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

use serde_json::Value;
use tokio::runtime::Handle;

use super::args::Keeps;
use super::client::{connect, failure};
use super::migrate::save;
use super::{ExitStatus, Failure};
use crate::control::VmName;
use crate::migrate::Migration;
use crate::qmp::Client;

/// Where the file is, unless TMPDIR says where: it is as large as what isn't zeros of the guest's memory.
const PLACE: &str = "/var/tmp";

/// The VM whose guest it is, and which goes on.
#[derive(Debug)]
pub struct Original {
    name: VmName,
    client: Client,
}

/// A directory for the file while that has a name; whoever drops it is the last one who needs it.
#[derive(Clone, Debug)]
pub struct OnItsWay {
    directory: PathBuf,
    /// The original is just saving its guest.
    saves: Arc<AtomicBool>,
    original: VmName,
}

impl Original {
    /// The VM of that name.
    ///
    /// # Errors
    /// There is none, or it can't be asked.
    pub fn find(name: &VmName) -> Result<Self, Failure> {
        Ok(Self { name: name.clone(), client: connect(name)? })
    }

    /// Has its guest come once the VM of that migration is built, whose end this is otherwise. What is given is dropped with that VM.
    ///
    /// # Errors
    /// There is no place for the file, or there are no more threads.
    pub fn follows(self, migration: &Arc<Migration>) -> Result<OnItsWay, Failure> {
        let directory = std::env::var_os("TMPDIR").filter(|directory| !directory.is_empty());
        let directory = directory.map_or_else(|| PLACE.into(), PathBuf::from);
        let on_its_way = OnItsWay::new(&directory, self.name.clone())?;
        let (migration, runtime, ours) = (Arc::clone(migration), Handle::current(), on_its_way.clone());
        let follow = move || {
            runtime.block_on(migration.built());
            let from = format!("the guest of {}", self.name);
            migration.come_by(&from, move || self.kept(&ours));
        };
        let spawned = Builder::new().name("clone".into()).spawn(follow);
        spawned.map_err(|e| Failure::of(ExitStatus::Unavailable, "can't start a thread", &e))?;
        Ok(on_its_way)
    }

    /// Its guest, in a file that has no name any more.
    fn kept(mut self, on_its_way: &OnItsWay) -> Result<File, Failure> {
        let (shown, path) = (self.name.as_str(), on_its_way.file());
        on_its_way.saves.store(true, Ordering::SeqCst);
        let saved = save(&mut self.client, &path, Some(Keeps::Running), false, shown, &mut io::sink());
        on_its_way.saves.store(false, Ordering::SeqCst);
        saved.map_err(|e| e.failure(|e| failure(shown, &e)))?;
        File::open(&path).map_err(|e| Failure::of(ExitStatus::Unavailable, &path.display().to_string(), &e))
    }
}

impl OnItsWay {
    fn new(place: &Path, original: VmName) -> Result<Self, Failure> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| Failure::of(ExitStatus::Unavailable, "no random number", &e))?;
        let directory = place.join(format!("soc-vmm-clone-{:016x}", u64::from_ne_bytes(random)));
        // Guest memory is for its owner alone.
        DirBuilder::new().mode(0o700).create(&directory).map_err(|e| {
            let why = format!("{}: {e}; TMPDIR says where there is room for the guest's memory", directory.display());
            Failure::new(ExitStatus::Unavailable, why)
        })?;
        Ok(Self { directory, saves: Arc::default(), original })
    }

    fn file(&self) -> PathBuf {
        self.directory.join("guest")
    }
}

/// A guest that is still written there comes to nothing, and the original goes on.
impl Drop for OnItsWay {
    fn drop(&mut self) {
        // They are gone already, unless the VM ends before it has its guest.
        _ = fs::remove_file(self.file());
        _ = fs::remove_dir(&self.directory);
        // The original need not write what nobody takes.
        if self.saves.load(Ordering::SeqCst)
            && let Ok(mut client) = connect(&self.original)
        {
            _ = client.execute::<Value>("migrate_cancel");
        }
    }
}
