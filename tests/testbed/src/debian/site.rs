//! What a Debian needs that moves from one emulated server to another one: a disk that both see, and a network that both are at.

use std::path::Path;

use tempfile::TempDir;

use super::worker::Echo;
use super::{COMMAND_LINE, Passt, image, tools};
use crate::machine::Error;
use crate::scratch;
use crate::switch::Switch;
use crate::vmm::{Boot, VmConfig};

/// The disk, the network and who answers there, on this machine. It ends with this handle.
#[derive(Debug)]
pub struct Site {
    /// Who talks with the guest.
    pub echo: Echo,
    args: Vec<String>,
    // Dropped in this order: passt ends with its connection.
    _switch: Switch,
    _passt: Passt,
    dir: TempDir,
}

impl Site {
    /// A copy of the disk, and a switch with passt at it.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new() -> Result<Self, Error> {
        let (image, tools) = (image()?, tools()?);
        let dir = scratch::dir().map_err(Error::file(std::env::temp_dir()))?;
        let disk = dir.path().join("disk");
        image.copy_disk(&disk)?;
        let passt = Passt::start(&tools, dir.path().join("passt"))?;
        let switch = Switch::start(dir.path().join("switch"))?;
        switch.connect(passt.socket())?;
        let [kernel, initrd] = [&image.kernel, &image.initrd].map(|path| path.display().to_string());
        let (disk, net) = (format!("file={}", disk.display()), format!("stream={}", switch.socket().display()));
        let args =
            ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", COMMAND_LINE, "--disk", &disk, "--net", &net];
        let args = args.map(str::to_owned).to_vec();
        Ok(Self { echo: Echo::start()?, args, _switch: switch, _passt: passt, dir })
    }

    /// A VM for it, on the first function of any server: to be booted, or to be moved to.
    #[must_use]
    pub fn vm(&self, name: &str) -> VmConfig {
        VmConfig { boot: Boot::AsTold, args: self.args.clone(), ..VmConfig::new(name, 0) }
    }

    /// Where the sockets are by which it moves.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}
