//! What is to be run: the entries of kvm-unit-tests' `x86/unittests.cfg` (its format is described at the file's top and in the
//! suite's docs/unittests.txt).

use std::time::Duration;

/// An entry without one has this long.
const TIMEOUT: Duration = Duration::from_secs(90);

/// One test: an image, and what it runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// The image, in the directory of the configuration.
    pub(crate) file: String,
    pub(crate) cpus: u32,
    /// What the test is told.
    pub(crate) arguments: String,
    /// What QEMU is told.
    pub(crate) qemu: Vec<String>,
    /// Other architecture than x86-64, if it is for one alone.
    pub(crate) only_for: Option<String>,
    pub(crate) groups: Vec<String>,
    /// `path=value`: files that must hold these values.
    pub(crate) checks: Vec<String>,
    /// How long it may take.
    pub(crate) timeout: Duration,
}

impl Entry {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            file: String::new(),
            cpus: 1,
            arguments: String::new(),
            qemu: Vec::new(),
            only_for: None,
            groups: Vec::new(),
            checks: Vec::new(),
            timeout: TIMEOUT,
        }
    }

    pub(crate) fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|of| of == group)
    }

    fn set(&mut self, key: &str, value: &str, now: u64) -> Result<(), String> {
        let number = || value.parse::<u32>().map_err(|e| format!("{key} = {value}: {e}"));
        match key {
            "file" => value.clone_into(&mut self.file),
            "smp" => self.cpus = number()?,
            "test_args" => self.arguments = words(value, now)?.join(" "),
            "qemu_params" | "extra_params" => self.qemu = words(value, now)?,
            "arch" => self.only_for = (value != "x86_64").then(|| value.to_owned()),
            "groups" => self.groups = value.split_whitespace().map(str::to_owned).collect(),
            "check" => self.checks = value.split_whitespace().map(str::to_owned).collect(),
            "timeout" => self.timeout = Duration::from_secs(number()?.into()),
            // All are for KVM here.
            "accel" => {}
            _ => return Err(format!("{key}: not known")),
        }
        Ok(())
    }
}

/// The entries of the configuration `text`. Where one asks for the time of day, it is `now`, in seconds since 1970.
pub(crate) fn parse(text: &str, now: u64) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            entries.push(Entry::new(name));
            continue;
        }
        let done = match (line.split_once('='), entries.last_mut()) {
            (Some((key, value)), Some(entry)) => entry.set(key.trim(), value.trim(), now),
            _ => Err("neither a section nor a setting of one".to_owned()),
        };
        done.map_err(|e| format!("line {}: {e}", number + 1))?;
    }
    Ok(entries)
}

/// The words of `text` as a shell would split them. The one command that such a line runs is `date +%s`.
fn words(text: &str, now: u64) -> Result<Vec<String>, String> {
    let text = text.replace("`date +%s`", &now.to_string());
    if text.contains(['`', '$', '\\']) || text.contains("\"\"\"") {
        return Err(format!("{text}: needs a shell"));
    }
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in text.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if c == '"' || c == '\'' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    match quote {
        Some(open) => Err(format!("{text}: {open} isn't closed")),
        None => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_its_lines_say() {
        let text = "# about\n[apic]\nfile = apic.flat\nsmp = 2\nqemu_params = -cpu qemu64,+x2apic -m 2048\ntimeout = 30\n\n\
                    [clock]\nfile = clock.flat\ntest_args = \"1000 `date +%s`\"\narch = i386\ngroups = a b\ncheck = /sys/x=Y /y=0\n";
        let entries = parse(text, 77).unwrap();
        assert_eq!(entries.len(), 2);
        let [apic, clock] = [&entries[0], &entries[1]];
        assert_eq!((apic.file.as_str(), apic.cpus, apic.timeout.as_secs()), ("apic.flat", 2, 30));
        assert_eq!(apic.qemu, ["-cpu", "qemu64,+x2apic", "-m", "2048"]);
        assert_eq!((clock.arguments.as_str(), clock.cpus, clock.timeout), ("1000 77", 1, TIMEOUT));
        assert_eq!(clock.only_for.as_deref(), Some("i386"));
        assert!(clock.is_in("b") && !clock.is_in("c"));
        assert_eq!(clock.checks, ["/sys/x=Y", "/y=0"]);
    }

    #[test]
    fn quotes_keep_words_together() {
        assert_eq!(words("a 'b c' \"d\"e ''", 0).unwrap(), ["a", "b c", "de", ""]);
        for wrong in ["'a", "`id`", "$HOME"] {
            assert!(words(wrong, 0).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_understood_is_said_with_its_line() {
        assert_eq!(parse("[a]\nwhat = 1\n", 0).unwrap_err(), "line 2: what: not known");
        assert!(parse("file = a\n", 0).is_err());
    }
}
