//! Kernel modules for an initramfs: found by name, with what they depend on, decompressed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::fetch::{Kernel, QemuRoot};
use crate::process::{CommandError, run_bytes};

/// Why modules couldn't be gathered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no module of that name, neither as a file nor built in.
    #[error("the kernel has no module {0}")]
    Unknown(String),
    /// The module tree can't be read.
    #[error("{path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A module can't be decompressed.
    #[error("decompressing a module")]
    Decompress(#[from] CommandError),
}

/// A module's name and its ELF file.
#[derive(Clone, Debug)]
pub struct KernelModule {
    /// Its name, with underscores.
    pub name: String,
    /// The file's content.
    pub content: Vec<u8>,
}

/// The modules `names` of `kernel` and all they depend on, in an order of loading. What is built in is left out.
///
/// # Errors
/// [`Error`].
pub fn gather(kernel: &Kernel, tools: &QemuRoot, names: &[&str]) -> Result<Vec<KernelModule>, Error> {
    let tree = Tree::read(kernel)?;
    let mut ordered = Vec::new();
    for name in names {
        tree.visit(&underscored(name), tools, &mut ordered)?;
    }
    Ok(ordered)
}

/// Every module of a kernel by name; `None` for one that is built in.
struct Tree {
    files: BTreeMap<String, Option<PathBuf>>,
}

impl Tree {
    fn read(kernel: &Kernel) -> Result<Self, Error> {
        let mut files = BTreeMap::new();
        let list = kernel.modules.join("modules.builtin");
        let text = fs::read_to_string(&list).map_err(|source| Error::File { path: list, source })?;
        for line in text.lines() {
            files.insert(module_name(Path::new(line)), None);
        }
        let mut pending = vec![kernel.modules.join("kernel")];
        while let Some(dir) = pending.pop() {
            let failed = |source| Error::File { path: dir.clone(), source };
            for entry in fs::read_dir(&dir).map_err(failed)? {
                let path = entry.map_err(failed)?.path();
                if path.is_dir() {
                    pending.push(path);
                } else {
                    files.insert(module_name(&path), Some(path));
                }
            }
        }
        Ok(Self { files })
    }

    /// Depth first, so that what a module needs comes before it. The kernel's modules have no cycles.
    fn visit(&self, name: &str, tools: &QemuRoot, ordered: &mut Vec<KernelModule>) -> Result<(), Error> {
        if ordered.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(file) = self.files.get(name).ok_or_else(|| Error::Unknown(name.to_owned()))? else {
            return Ok(());
        };
        let content = decompressed(file, tools)?;
        for needed in dependencies(&content) {
            self.visit(&needed, tools, ordered)?;
        }
        ordered.push(KernelModule { name: name.to_owned(), content });
        Ok(())
    }
}

fn decompressed(file: &Path, tools: &QemuRoot) -> Result<Vec<u8>, Error> {
    if file.extension().is_some_and(|ext| ext == "xz") {
        let mut xz = tools.command("xz");
        Ok(run_bytes(xz.arg("-dc").arg(file).stdin(Stdio::null()))?)
    } else {
        fs::read(file).map_err(|source| Error::File { path: file.to_path_buf(), source })
    }
}

/// What a module's own `.modinfo` says it needs: an entry `depends=a,b`, ended by a zero byte. (`modules.dep` is made when a
/// kernel is installed, and these kernels are only unpacked.)
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(underscored)
        .collect()
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is `kvm_amd`.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    underscored(file.split('.').next().unwrap_or_default())
}

fn underscored(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_dependencies() {
        assert_eq!(module_name(Path::new("kernel/kvm/kvm-amd.ko.xz")), "kvm_amd");
        let module = b"\x7fELF..license=GPL\0depends=kvm,irq-bypass\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["kvm", "irq_bypass"]);
        assert!(dependencies(b"\0depends=\0name=vfio\0").is_empty());
    }
}
