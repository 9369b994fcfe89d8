//! Where the testbed keeps what it fetched and built: everything under `target/testbed/`.

use std::path::{Path, PathBuf};

/// The root of the workspace this crate was compiled in.
#[must_use]
pub fn workspace() -> PathBuf {
    // tests/testbed is two levels below the root.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// Cargo's target directory: `$CARGO_TARGET_DIR`, else `target/` of the workspace.
#[must_use]
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        // A relative value counts from where cargo was started; for everyone who runs cargo in this
        // workspace that is its root.
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// The testbed's cache, `target/testbed/`.
#[must_use]
pub fn cache() -> PathBuf {
    target().join("testbed")
}
