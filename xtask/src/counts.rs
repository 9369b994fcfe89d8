//! How many tests ran, from what their runners print.

use std::ops::AddAssign;

/// Tests by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Counts {
    /// From the output of Rust's test harness (a "test result" line for each binary) or of nextest (one "Summary" line).
    pub(crate) fn of(output: &str) -> Self {
        let mut harness = Self::default();
        let mut nextest = None;
        for line in output.lines() {
            let line = line.trim_start();
            if let Some(result) = line.strip_prefix("test result:") {
                harness += Self {
                    passed: before(result, "passed"),
                    failed: before(result, "failed"),
                    skipped: before(result, "ignored"),
                };
            } else if line.starts_with("Summary [") {
                nextest = Some(Self {
                    passed: before(line, "passed"),
                    failed: before(line, "failed") + before(line, "timed out"),
                    skipped: before(line, "skipped"),
                });
            }
        }
        // nextest shows what a failed test's own harness said: that is in its summary already.
        nextest.unwrap_or(harness)
    }

    /// Counts `tests` that said they can't run as skipped: their runner called them passed.
    pub(crate) fn without(mut self, tests: u64) -> Self {
        let tests = tests.min(self.passed);
        self.passed -= tests;
        self.skipped += tests;
        self
    }
}

/// The tests that a runner left out, with the reason where it knows one.
pub(crate) fn left_out(output: &str) -> Vec<String> {
    output.lines().filter_map(|line| by_harness(line).or_else(|| by_nextest(line))).collect()
}

/// The tests that failed, each once: nextest names them as they end and again at its own end. Not those of [`flaky`].
pub(crate) fn failures(output: &str) -> Vec<String> {
    let flaky = flaky(output);
    let mut names: Vec<String> = Vec::new();
    for line in output.lines() {
        if let Some(name) = failed_by_harness(line).or_else(|| failed_by_nextest(line))
            && !names.contains(&name)
            && !flaky.contains(&name)
        {
            names.push(name);
        }
    }
    names
}

/// The tests that failed, and passed when nextest ran them again: `FLAKY K/N [ TIME] (K/N) BINARY NAME`.
pub(crate) fn flaky(output: &str) -> Vec<String> {
    let name = |line: &str| last_two(line.trim_start().strip_prefix("FLAKY ")?.split_once(" [")?.1);
    output.lines().filter_map(name).collect()
}

/// `test NAME ... FAILED`. What a failed test's harness printed is indented in nextest's output.
fn failed_by_harness(line: &str) -> Option<String> {
    Some(line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?.to_owned())
}

/// `FAIL [ TIME] (K/N) BINARY NAME`, or with `FAIL + LEAK`, `TIMEOUT` or a signal's name in its place, behind `TRY K` where it ran before or
/// runs again.
fn failed_by_nextest(line: &str) -> Option<String> {
    let (how, rest) = line.trim_start().split_once(" [")?;
    let how = how.strip_prefix("TRY ").and_then(|tried| tried.split_once(' ')).map_or(how, |(_, how)| how);
    if !["FAIL", "LEAK-FAIL", "TIMEOUT", "TMT", "ABORT", "ABRT", "SIG"].iter().any(|one| how.starts_with(one)) {
        return None;
    }
    last_two(rest)
}

fn last_two(text: &str) -> Option<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let from = words.len().checked_sub(2)?;
    Some(words[from..].join(" "))
}

/// `test NAME ... ignored, REASON`
fn by_harness(line: &str) -> Option<String> {
    let (name, reason) = line.strip_prefix("test ")?.split_once(" ... ignored")?;
    Some(named(name, reason.trim_start_matches([',', ' '])))
}

/// `SKIP [   ] (──) BINARY NAME`
fn by_nextest(line: &str) -> Option<String> {
    let rest = line.trim_start().strip_prefix("SKIP [")?;
    Some(named(&last_two(rest)?, ""))
}

fn named(name: &str, reason: &str) -> String {
    let reason = if reason.is_empty() { "marked #[ignore]" } else { reason };
    format!("{name}: {reason}")
}

/// The number in front of `word`.
fn before(line: &str, word: &str) -> u64 {
    line.find(word).and_then(|at| line[..at].split_whitespace().next_back()?.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_lines_are_added_up() {
        let output = "\
running 3 tests
test a ... ok
test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: FAILED. 4 passed; 1 failed; 0 ignored; 0 measured; 9 filtered out; finished in 1s
";
        let counts = Counts { passed: 6, failed: 1, skipped: 1 };
        assert_eq!(Counts::of(output), counts);
    }

    #[test]
    fn nextests_summary_is_enough() {
        let output = "\
        PASS [   0.010s] ( 1/23) api-channel a
    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 8.26s
     Summary [  12.345s] 23 tests run: 19 passed (1 slow), 3 failed, 1 timed out, 5 skipped
";
        let counts = Counts { passed: 19, failed: 4, skipped: 5 };
        assert_eq!(Counts::of(output), counts);
    }

    #[test]
    fn what_was_left_out_has_a_name() {
        let output = "\
test fault::tests::a_fault ... ignored, ends its process
test fault::tests::b ... ignored
test fault::tests::c ... ok
        SKIP [         ] (─────) pcie-function fault::tests::d
        PASS [   0.011s] ( 1/20) pcie-function e
";
        assert_eq!(
            left_out(output),
            [
                "fault::tests::a_fault: ends its process",
                "fault::tests::b: marked #[ignore]",
                "pcie-function fault::tests::d: marked #[ignore]",
            ]
        );
    }

    #[test]
    fn what_failed_has_a_name_and_is_named_once() {
        let output = "\
test fault::tests::a_fault ... FAILED
test fault::tests::b ... ok
        FAIL [   8.260s] ( 7/23) integration::saved a_page_is_damaged
    test a_page_is_damaged ... FAILED
        PASS [   0.011s] ( 8/23) pcie-function e
     TIMEOUT [1200.010s] ( 9/23) integration::machine_four four_functions
 FAIL + LEAK [   0.010s] (11/23) integration::saved it_leaves_somebody
     SIGABRT [   0.010s] (10/23) integration::faults it_aborts
        FAIL [   8.260s] ( 7/23) integration::saved a_page_is_damaged
";
        assert_eq!(
            failures(output),
            [
                "fault::tests::a_fault",
                "integration::saved a_page_is_damaged",
                "integration::machine_four four_functions",
                "integration::saved it_leaves_somebody",
                "integration::faults it_aborts",
            ]
        );
    }

    #[test]
    fn what_passed_when_it_ran_again_is_flaky_and_did_not_fail() {
        let output = "\
  TRY 1 FAIL [   0.147s] (────) integration::saved fails
  TRY 1 FAIL [   0.176s] (────) integration::saved flaky
  TRY 1 ABRT [   0.006s] (────) integration::saved aborts
  TRY 2 PASS [   0.011s] (3/4) integration::saved flaky
  TRY 2 FAIL [   0.122s] (4/4) integration::saved fails
  TRY 2 ABRT [   0.012s] (1/4) integration::saved aborts
     Summary [   0.271s] 4 tests run: 2 passed (1 flaky), 2 failed, 1 skipped
   FLAKY 2/2 [   0.011s] (3/4) integration::saved flaky
";
        assert_eq!(flaky(output), ["integration::saved flaky"]);
        assert_eq!(failures(output), ["integration::saved fails", "integration::saved aborts"]);
        assert_eq!(Counts::of(output), Counts { passed: 2, failed: 2, skipped: 1 });
    }

    #[test]
    fn a_test_that_said_it_cant_run_did_not_pass() {
        let counts = Counts { passed: 3, failed: 1, skipped: 0 };
        let corrected = Counts { passed: 1, failed: 1, skipped: 2 };
        assert_eq!(counts.without(2), corrected);
    }
}
