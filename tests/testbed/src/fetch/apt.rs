//! A package source of its own beside the system's: apt with a private state directory.
//!
//! The machine's proxy, authentication and mirror settings apply (its apt.conf is read first); its sources, its package
//! state and its installed packages are neither used nor changed, so nothing here needs root. Packages are unpacked with
//! `dpkg -x`; no maintainer script runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Arch, Error};
use crate::process::run;

/// Where Debian's archive is when the system's own sources name no mirror.
const ARCHIVE: &str = "http://deb.debian.org/debian/";
const SECURITY: &str = "http://deb.debian.org/debian-security/";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One private apt: a set of suites, its package lists and what was downloaded.
pub(crate) struct Apt {
    dir: PathBuf,
    arch: Arch,
}

impl Apt {
    /// Prepares `dir` and brings the lists of `suites` up to date, for amd64 and arm64.
    ///
    /// # Errors
    /// No apt here, or the archive can't be reached.
    pub(crate) fn open(dir: &Path, suites: &[&str]) -> Result<Self, Error> {
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).map_err(|e| Error::file(dir, e))?;
        }
        let mirrors = Mirrors::of_the_system();
        let write = |name: &str, text: &str| {
            let file = dir.join(name);
            fs::write(&file, text).map_err(|e| Error::file(&file, e))
        };
        write("status", "")?;
        write("sources.list", &sources(&mirrors, suites))?;
        write("apt.conf", &configuration(dir))?;
        let apt = Self { dir: dir.to_path_buf(), arch: Arch::Amd64 };
        run(apt.get().args(["update", "-qq", "-o", "APT::Update::Error-Mode=any"])).map_err(Error::unreachable)?;
        Ok(apt)
    }

    /// The same as a machine of `arch` sees it: packages that no architecture is named of are of that one, and so is what they depend on.
    pub(crate) fn of(self, arch: Arch) -> Self {
        Self { arch, ..self }
    }

    /// Unpacks `packages` and all they depend on into `into`, preferring suite `release` to newer or
    /// older ones if given, leaving out packages whose
    /// name `unwanted` names.
    pub(crate) fn unpack_closure(
        &self,
        release: Option<&str>,
        packages: &[&str],
        unwanted: &[&str],
        into: &Path,
    ) -> Result<(), Error> {
        run(self
            .get()
            .args(["install", "-qq", "-y", "--no-install-recommends", "--download-only"])
            .args(release.map(|suite| format!("--target-release={suite}")))
            .args(packages)
            .stdout(Stdio::null()))
        .map_err(Error::unreachable)?;
        let archives = self.dir.join("cache/archives");
        self.unpack_all(&archives, unwanted, into)
    }

    /// Unpacks exactly `packages` into `into`, without what they depend on.
    pub(crate) fn unpack_only(&self, packages: &[&str], into: &Path) -> Result<(), Error> {
        let downloads = self.dir.join("downloads");
        fs::create_dir_all(&downloads).map_err(|e| Error::file(&downloads, e))?;
        run(self.get().args(["download", "-qq"]).args(packages).current_dir(&downloads)).map_err(Error::unreachable)?;
        self.unpack_all(&downloads, &[], into)
    }

    /// The package that the metapackage `name` stands for: its first dependency whose name begins with `prefix`.
    pub(crate) fn behind_metapackage(&self, name: &str, prefix: &str) -> Result<String, Error> {
        let listing = run(Command::new("apt-cache")
            .arg("-c")
            .arg(self.dir.join("apt.conf"))
            .args(["depends", name])
            .stdout(Stdio::piped()))?;
        listing
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|package| package.starts_with(prefix))
            .map(str::to_owned)
            .ok_or_else(|| Error::Recipe(format!("{name} depends on no package {prefix}…")))
    }

    fn unpack_all(&self, debs: &Path, unwanted: &[&str], into: &Path) -> Result<(), Error> {
        fs::create_dir_all(into).map_err(|e| Error::file(into, e))?;
        for entry in fs::read_dir(debs).map_err(|e| Error::file(debs, e))? {
            let deb = entry.map_err(|e| Error::file(debs, e))?.path();
            let name = deb.file_name().unwrap_or_default().to_string_lossy();
            if !name.ends_with(".deb") {
                continue;
            }
            let package = name.split('_').next().unwrap_or_default();
            if !unwanted.contains(&package) {
                run(Command::new("dpkg").arg("-x").arg(&deb).arg(into))?;
            }
            // Unpacked once, it is of no further use.
            fs::remove_file(&deb).map_err(|e| Error::file(&deb, e))?;
        }
        Ok(())
    }

    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.arg("-c").arg(self.dir.join("apt.conf")).env("DEBIAN_FRONTEND", "noninteractive");
        command.args(["-o", &format!("APT::Architecture={}", self.arch.debian())]);
        command
    }
}

/// The mirrors that the system's own sources use for Debian, else the public ones.
struct Mirrors {
    archive: String,
    security: String,
}

impl Mirrors {
    fn of_the_system() -> Self {
        // "URI origin codename" for each index that apt knows.
        let known = run(Command::new("apt-get")
            .args(["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(CODENAME)"])
            .stdout(Stdio::piped()))
        .unwrap_or_default();
        Self::among(&known)
    }

    fn among(known: &str) -> Self {
        let debian: Vec<(&str, &str)> = known
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (uri, origin, codename) = (words.next()?, words.next()?, words.next()?);
                (origin == "Debian").then_some((uri, codename))
            })
            .collect();
        let first = |security: bool, default: &str| {
            debian
                .iter()
                .find(|(_, codename)| codename.ends_with("-security") == security)
                .map_or(default, |(uri, _)| uri)
                .to_owned()
        };
        Self { archive: first(false, ARCHIVE), security: first(true, SECURITY) }
    }
}

fn sources(mirrors: &Mirrors, suites: &[&str]) -> String {
    suites
        .iter()
        .map(|suite| {
            let uri = if suite.ends_with("-security") { &mirrors.security } else { &mirrors.archive };
            format!("deb [arch=amd64,arm64 signed-by={KEYRING}] {uri} {suite} main\n")
        })
        .collect()
}

fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"#clear APT::Architectures;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; "arm64"; }};
APT::Sandbox::User "root";
Dir::State "{dir}/state";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}/cache";
Dir::Etc::sourcelist "{dir}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Acquire::Languages "none";
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_mirror_is_used_where_there_is_one() {
        let known = "http://mirror.example/other/ Other stable\n\
                     http://mirror.example/debian/ Debian bookworm\n\
                     http://mirror.example/sec/ Debian bookworm-security\n";
        let mirrors = Mirrors::among(known);
        assert_eq!(mirrors.archive, "http://mirror.example/debian/");
        assert_eq!(mirrors.security, "http://mirror.example/sec/");
    }

    #[test]
    fn debians_public_archive_otherwise() {
        let mirrors = Mirrors::among("");
        assert_eq!(mirrors.archive, ARCHIVE);
        assert_eq!(mirrors.security, SECURITY);
        let lines = sources(&mirrors, &["trixie", "bookworm-security"]);
        assert!(lines.contains("deb.debian.org/debian/ trixie main"));
        assert!(lines.contains("deb.debian.org/debian-security/ bookworm-security main"));
    }
}
