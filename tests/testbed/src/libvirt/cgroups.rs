//! cgroups of a libvirt's own, made beside those of the machine's services and gone with it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::scratch;

use super::Error;

/// Where this process sees them.
const MOUNTS: &str = "/proc/self/mountinfo";

/// The cgroup of version 2 that those inside are in who aren't domains.
const DAEMONS: &str = "daemons";

/// One cgroup in each hierarchy that has controllers. It is removed with all below it; who was in it has ended by then.
#[derive(Debug)]
pub(super) struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    name: String,
}

/// A mounted one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mounted: PathBuf,
    /// Version 1's, as they are given to mount; version 2 has none there.
    controllers: Option<String>,
}

impl Cgroups {
    /// Makes them, and removes those whose maker was killed.
    pub(super) fn make(name: &str) -> Result<Self, Error> {
        let mounts = fs::read_to_string(MOUNTS).map_err(Error::file(Path::new(MOUNTS)))?;
        let cgroups = Self { hierarchies: hierarchies(&mounts), name: name.to_owned() };
        if cgroups.hierarchies.is_empty() {
            return Err(Error::file(Path::new(MOUNTS))(std::io::Error::other("no cgroups are mounted")));
        }
        for hierarchy in &cgroups.hierarchies {
            let old = scratch::left_behind(&hierarchy.mounted).map_err(Error::file(&hierarchy.mounted))?;
            old.iter().for_each(|group| remove(group));
            let group = hierarchy.mounted.join(name);
            fs::create_dir(&group).map_err(Error::file(&group))?;
            if hierarchy.controllers.is_none() {
                has_controllers(&group)?;
            }
            // A new cpuset of version 1 is empty, and nobody may enter it.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (of_all, own) = (hierarchy.mounted.join(file), group.join(file));
                if hierarchy.controllers.is_some() && own.exists() {
                    fs::copy(&of_all, &own).map_err(Error::file(&own))?;
                }
            }
        }
        Ok(cgroups)
    }

    /// The files by which a process enters them.
    pub(super) fn doors(&self) -> Vec<PathBuf> {
        self.groups().map(|group| group.join("cgroup.procs")).collect()
    }

    /// The files by which one enters them later: version 2 lets nobody be where there are cgroups with controllers below.
    pub(super) fn inner_doors(&self) -> Vec<PathBuf> {
        let doors = self.hierarchies.iter().zip(self.groups()).map(|(hierarchy, group)| match hierarchy.controllers {
            Some(_) => group,
            None => group.join(DAEMONS),
        });
        doors.map(|group| group.join("cgroup.procs")).collect()
    }

    /// What is to be mounted inside: `v2`, or version 1's controllers, a word a hierarchy.
    pub(super) fn mounts(&self) -> String {
        let of = |hierarchy: &Hierarchy| hierarchy.controllers.clone().unwrap_or_else(|| "v2".to_owned());
        self.hierarchies.iter().map(of).collect::<Vec<_>>().join(" ")
    }

    fn groups(&self) -> impl Iterator<Item = PathBuf> {
        self.hierarchies.iter().map(|hierarchy| hierarchy.mounted.join(&self.name))
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        self.groups().for_each(|group| remove(&group));
    }
}

/// Fails where a cgroup of version 2 has none of the controllers for which libvirtd makes cgroups.
fn has_controllers(group: &Path) -> Result<(), Error> {
    const USED: [&str; 4] = ["cpu", "cpuset", "io", "memory"];
    let file = group.join("cgroup.controllers");
    let controllers = fs::read_to_string(&file).map_err(Error::file(&file))?;
    if controllers.split_whitespace().any(|controller| USED.contains(&controller)) {
        return Ok(());
    }
    Err(Error::file(&file)(std::io::Error::other(format!("it has none of {USED:?}"))))
}

/// Removes a cgroup and all below it. Where somebody is in it still, it stays for the next one's sweep.
fn remove(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// Those of version 1 that have controllers; if there are none, that of version 2.
fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let Some(mounted) = before.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut after = after.split(' ');
        match (after.next(), after.nth(1)) {
            (Some("cgroup2"), _) => second.push(Hierarchy { mounted, controllers: None }),
            (Some("cgroup"), Some(options)) if !options.contains("name=") => {
                let controllers = options.split(',').filter(|option| !["rw", "ro", "xattr"].contains(option));
                let controllers = Some(controllers.collect::<Vec<_>>().join(","));
                first.push(Hierarchy { mounted, controllers });
            }
            _ => {}
        }
    }
    second.truncate(1);
    if first.is_empty() { second } else { first }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_as_they_are_mounted() {
        let v2 = "24 30 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let v1 = "25 22 0:21 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n\
                  26 22 0:23 / /sys/fs/cgroup/systemd rw shared:6 - cgroup cgroup rw,xattr,name=systemd\n";
        let of = |mounted: &str, controllers: Option<&str>| Hierarchy {
            mounted: mounted.into(),
            controllers: controllers.map(str::to_owned),
        };
        assert_eq!(hierarchies(v2), [of("/sys/fs/cgroup", None)]);
        assert_eq!(hierarchies(&format!("{v2}{v1}")), [of("/sys/fs/cgroup/cpu,cpuacct", Some("cpu,cpuacct"))]);
        assert_eq!(hierarchies("22 1 254:0 / / rw - ext4 /dev/vda rw\n"), []);
    }
}
