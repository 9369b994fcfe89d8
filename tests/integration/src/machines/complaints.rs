//! What a guest's own tools find wrong with its machine.

/// Lines that a kernel may print, each with its reason.
const ALLOWED: &str = include_str!("kernel-messages.txt");

/// Marks of lspci: a device that doesn't answer, one that answers nonsense, a register that was never placed or is out of the
/// bridge's window, an error that a device has seen.
const OF_LSPCI: [&str; 10] = [
    "(rev ff)",
    "!!!",
    "<access denied>",
    "<unassigned>",
    "<ignored>",
    "[virtual]",
    "Unknown header type",
    "UncorrErr+",
    "FatalErr+ Uns",
    ">SERR+",
];

/// The lines of `said`, which dmesg printed of levels from "warning" on, for which kernel-messages.txt has no reason.
#[must_use]
pub fn of_the_kernel(said: &str) -> Vec<&str> {
    let allowed: Vec<&str> = ALLOWED.lines().filter_map(|line| line.split_once(" | ")).map(|(part, _)| part).collect();
    lines(said).filter(|line| !allowed.iter().any(|part| line.contains(part))).collect()
}

/// The lines of what `lspci -vv` printed that tell of a fault.
#[must_use]
pub fn of_lspci(said: &str) -> Vec<&str> {
    lines(said).filter(|line| OF_LSPCI.iter().any(|mark| line.contains(mark))).collect()
}

/// The lines of what `iasl -d` printed that tell of a fault.
#[must_use]
pub fn of_iasl(said: &str) -> Vec<&str> {
    lines(said)
        .filter(|line| ["Error", "Warning", "Incorrect", "Invalid", "Could not"].iter().any(|mark| line.contains(mark)))
        .collect()
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_reason_is_no_complaint() {
        let said = "mtrr: your CPUs had inconsistent fixed MTRR settings\r\n\nACPI Error: AE_NOT_FOUND\n";
        assert_eq!(of_the_kernel(said), ["ACPI Error: AE_NOT_FOUND"]);
        for line in ALLOWED.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (part, reason) = line.split_once(" | ").expect(line);
            assert!(!part.is_empty() && !reason.is_empty(), "{line}");
        }
    }

    #[test]
    fn tools_marks_are_found() {
        let lspci =
            "00:01.0 Ethernet controller: A\n\tRegion 0: Memory at <unassigned> (32-bit)\n\tKernel driver in use: a\n";
        assert_eq!(of_lspci(lspci), ["Region 0: Memory at <unassigned> (32-bit)"]);
        let iasl = "ACPI: DSDT 0x0000000000000000 00209D (v01 A B 00000001 C 00000001)\nACPI Error: Incorrect checksum in table [DSDT]\n";
        assert_eq!(of_iasl(iasl).len(), 1);
    }
}
