//! QEMU's own QMP client: PyPI's `qemu.qmp` with its qmp-shell, and a Python to run it.

use std::path::PathBuf;
use std::process::Command;

use crate::debian;
use crate::fetch::{self, Error};
use crate::process::run;

/// Python and pip, Debian 12's.
const PACKAGES: [&str; 2] = ["python3", "python3-pip"];
/// Certificates and the mirror's address are the machine's own, as pip finds them.
const UNWANTED: [&str; 3] = ["ca-certificates", "debconf", "openssl"];
/// Of PyPI. It depends on nothing.
const CLIENT: &str = "qemu.qmp==0.0.6";
const PYTHON: &str = "usr/bin/python3.11";
/// Where [`CLIENT`] is, in the tree.
const SITE: &str = "site";

/// The client.
#[derive(Clone, Debug)]
pub struct QmpClient {
    dir: PathBuf,
}

/// Fetches it.
///
/// # Errors
/// [`Error`].
pub fn qmp_client() -> Result<QmpClient, Error> {
    let recipe = format!("1 {PACKAGES:?} {UNWANTED:?} {CLIENT}");
    let dir = fetch::part("qmp-client", &recipe, "Python and qemu.qmp (15 MB)", |into| {
        fetch::bookworm()?.unpack_closure(None, &PACKAGES, &UNWANTED, into)?;
        let client = QmpClient { dir: into.to_path_buf() };
        let mut pip = client.python();
        pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]);
        pip.args(["--disable-pip-version-check", "--no-cache-dir", "--target"]).arg(into.join(SITE)).arg(CLIENT);
        run(&mut pip).map_err(Error::Unreachable)?;
        Ok(())
    })?;
    Ok(QmpClient { dir })
}

impl QmpClient {
    /// A Python that can import it.
    #[must_use]
    pub fn python(&self) -> Command {
        let mut python = debian::command(&self.dir, PYTHON);
        python.env("PYTHONHOME", self.dir.join("usr")).env("PYTHONPATH", self.dir.join(SITE));
        python.env("PYTHONDONTWRITEBYTECODE", "1");
        python
    }

    /// Its qmp-shell.
    #[must_use]
    pub fn shell(&self) -> Command {
        let mut shell = self.python();
        shell.args(["-m", "qemu.qmp.qmp_shell"]);
        shell
    }
}
