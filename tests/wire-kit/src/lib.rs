//! What tests and fuzz targets of the wire share.

// The lanes' own unit tests need it as a file of theirs: a crate that depends on theirs sees other types.
#[path = "../../../ioreq-ring/tests/heap/mod.rs"]
mod heap;

use std::path::Path;

pub use heap::Heap;

/// The bytes of `tests/golden/NAME`: hex digits, spaces at will, `#` starts a comment.
///
/// # Panics
/// The file is missing, or no such text.
pub fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let digits: String = text.lines().flat_map(|line| line.split('#').next()).flat_map(str::split_whitespace).collect();
    assert!(digits.len().is_multiple_of(2) && digits.is_ascii(), "{name}: no whole number of hex bytes");
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap_or_else(|e| panic!("{name}: {e}"));
    (0..digits.len()).step_by(2).map(byte).collect()
}
