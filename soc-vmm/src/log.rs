//! What soc-vmm says in its log.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;

/// The library that reads and writes qcow2. It tells of errors that its caller gets too, as often as a guest brings them about, and names
/// no file.
const IMAGO: &str = "imago";

/// Which records a log of `level` has.
pub fn records(level: LevelFilter) -> Targets {
    let of_imago = if level >= LevelFilter::DEBUG { level } else { LevelFilter::OFF };
    Targets::new().with_default(level).with_target(IMAGO, of_imago)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn a_library_s_errors_are_for_who_looks_for_them() {
        let imago = "imago::qcow2::metadata";
        for level in [LevelFilter::ERROR, LevelFilter::WARN, LevelFilter::INFO] {
            let records = records(level);
            assert!(
                !records.would_enable(imago, &Level::ERROR) && records.would_enable("soc_vmm::block", &Level::ERROR)
            );
        }
        let records = records(LevelFilter::DEBUG);
        assert!(records.would_enable(imago, &Level::ERROR) && !records.would_enable(imago, &Level::TRACE));
    }
}
