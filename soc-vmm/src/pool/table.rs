//! Who has which function. No I/O: what happened is told with its time, and what is to be done is asked.
//!
//! | state | left by | for |
//! | --- | --- | --- |
//! | clearing | it was opened, and so is nobody's | free |
//! | | it can't be opened for [`PATIENCE`] | broken |
//! | free | [`Table::take`] | lent |
//! | lent | its client is gone | clearing |
//! | | it couldn't be opened for the client, or its client complained | broken |
//! | broken | it was opened | free |
//!
//! A function is given out only from *free*, to which the way leads only through opening it: while anybody is at work on it, that fails.

use std::time::{Duration, Instant, SystemTime};

use super::wire::{Listed, Standing};

/// How long a function may take to be free again; meanwhile who asks for one waits.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// The first pause between two tries to open a function, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// The longest while somebody may wait for it.
const LONGEST_CLEARING: Duration = Duration::from_secs(1);
/// The first pause after a complaint, and the longest: that it can be opened again doesn't say that what the client met is over.
const AFTER_COMPLAINT: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
/// How many functions a refusal names.
const MOST_NAMED: usize = 8;

/// A program that has a function, or wants one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tenant {
    /// Of the kernel's word.
    pub(super) uid: u32,
    /// Of the kernel's word, where it has one.
    pub(super) pid: Option<i32>,
    /// Of its own word.
    pub(super) vm: String,
}

/// What comes of asking for a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It has this one.
    Function(usize),
    /// One may be free soon.
    Wait,
    /// There is none; why.
    Refused(String),
}

/// All functions.
#[derive(Debug)]
pub(super) struct Table {
    functions: Vec<Function>,
    /// How many a user other than root may have.
    limit: usize,
}

#[derive(Debug)]
struct Function {
    name: String,
    state: State,
    since: SystemTime,
    /// Tries to open it that failed, since the last one that didn't.
    tries: u32,
    /// Clients that complained, since the last one that didn't.
    complaints: u32,
}

#[derive(Debug)]
enum State {
    Clearing { why: String, until: Instant },
    Free,
    Lent(Tenant),
    Broken { why: String, blamed_by: Option<u32> },
}

impl Table {
    /// Functions of which it isn't known yet whether anybody is at work on them.
    pub(super) fn new(names: Vec<String>, limit: Option<usize>, now: Instant) -> Self {
        let until = now + PATIENCE;
        let function = |name| Function {
            name,
            state: State::Clearing { why: String::new(), until },
            since: SystemTime::now(),
            tries: 0,
            complaints: 0,
        };
        Self { functions: names.into_iter().map(function).collect(), limit: limit.unwrap_or(usize::MAX) }
    }

    /// Gives `tenant` the first free function.
    pub(super) fn take(&mut self, tenant: &Tenant) -> Taken {
        let has = self.functions.iter().filter(|function| function.counts_for(tenant.uid)).count();
        if tenant.uid != 0 && has >= self.limit {
            let why = format!("user {} has {has} functions already, which is its limit", tenant.uid);
            return Taken::Refused(why);
        }
        if let Some(free) = self.functions.iter().position(|function| matches!(function.state, State::Free)) {
            self.functions[free].go(State::Lent(tenant.clone()));
            return Taken::Function(free);
        }
        if self.functions.iter().any(|function| matches!(function.state, State::Clearing { .. })) {
            return Taken::Wait;
        }
        Taken::Refused(self.all_taken())
    }

    /// The function could not be opened for who took it.
    pub(super) fn failed(&mut self, index: usize, why: String) {
        let function = &mut self.functions[index];
        assert!(matches!(function.state, State::Lent(_)), "{} failed while it was not lent", function.name);
        function.tries += 1;
        function.go(State::Broken { why, blamed_by: None });
    }

    /// Who had the function is gone, and perhaps has said why it couldn't use it.
    pub(super) fn given_back(&mut self, index: usize, complaint: Option<String>, now: Instant) {
        let function = &mut self.functions[index];
        let State::Lent(tenant) = &function.state else {
            panic!("{} was given back and not lent", function.name);
        };
        match complaint {
            Some(why) => {
                function.complaints += 1;
                let blamed_by = Some(tenant.uid);
                function.go(State::Broken { why, blamed_by });
            }
            None => {
                function.complaints = 0;
                function.go(State::Clearing { why: String::new(), until: now + PATIENCE });
            }
        }
    }

    /// Whether the function is to be opened, to see whether it is nobody's: after what pause.
    pub(super) fn next_try(&self, index: usize) -> Option<Duration> {
        let function = &self.functions[index];
        let (first, longest) = match &function.state {
            State::Free | State::Lent(_) => return None,
            State::Broken { blamed_by: Some(_), .. } if function.tries == 0 => {
                let doubled = 1 << (function.complaints - 1).min(16);
                return Some((AFTER_COMPLAINT.0 * doubled).min(AFTER_COMPLAINT.1));
            }
            State::Clearing { .. } => (PAUSES.0, LONGEST_CLEARING),
            State::Broken { .. } => PAUSES,
        };
        let Some(failed) = function.tries.checked_sub(1) else { return Some(Duration::ZERO) };
        Some((first * (1 << failed.min(16))).min(longest))
    }

    /// The function was opened and closed again, or could not be.
    pub(super) fn tried(&mut self, index: usize, opened: Result<(), String>, now: Instant) {
        let function = &mut self.functions[index];
        let tried = matches!(function.state, State::Clearing { .. } | State::Broken { .. });
        assert!(tried, "{} was opened and is free or lent", function.name);
        match opened {
            Ok(()) => {
                function.tries = 0;
                function.go(State::Free);
            }
            Err(reason) => {
                function.tries = function.tries.saturating_add(1);
                match &mut function.state {
                    State::Clearing { why, .. } | State::Broken { why, .. } => *why = reason,
                    State::Free | State::Lent(_) => {}
                }
                self.late(index, now);
            }
        }
    }

    /// What is still not free after its time is broken; when to look again, if that is not over.
    pub(super) fn late(&mut self, index: usize, now: Instant) -> Option<Duration> {
        let function = &mut self.functions[index];
        let State::Clearing { why, until } = &mut function.state else { return None };
        let left = until.saturating_duration_since(now);
        if !left.is_zero() {
            return Some(left);
        }
        let why = Some(std::mem::take(why)).filter(|why| !why.is_empty());
        let why = why.unwrap_or_else(|| "another program uses it, or it is stuck".into());
        function.go(State::Broken { why, blamed_by: None });
        None
    }

    /// Why a function is out of use.
    pub(super) fn broken(&self, index: usize) -> Option<&str> {
        match &self.functions[index].state {
            State::Broken { why, .. } => Some(why),
            _ => None,
        }
    }

    /// All of them, to be shown.
    pub(super) fn list(&self) -> Vec<Listed> {
        self.functions.iter().map(Function::listed).collect()
    }

    /// How many there are, and where they are.
    fn all_taken(&self) -> String {
        let count = self.functions.len();
        let named = self.functions.iter().take(MOST_NAMED).map(|function| match &function.state {
            State::Lent(tenant) => {
                let pid = tenant.pid.map(|pid| format!("pid {pid}, ")).unwrap_or_default();
                format!("{} is used by {} ({pid}uid {})", function.name, tenant.vm, tenant.uid)
            }
            State::Clearing { why, .. } | State::Broken { why, .. } => format!("{} is broken: {why}", function.name),
            State::Free => format!("{} is free", function.name),
        });
        let named = named.collect::<Vec<_>>().join("; ");
        let more = if count > MOST_NAMED { format!("; and {} more", count - MOST_NAMED) } else { String::new() };
        let are = if count == 1 { "the one function is not".into() } else { format!("none of {count} functions is") };
        format!("{are} free: {named}{more}")
    }
}

impl Function {
    fn go(&mut self, state: State) {
        self.state = state;
        self.since = SystemTime::now();
    }

    /// Whether it is one of the functions that `uid` may have no more than so many of: also one that it complained of, or it could have
    /// everybody go without.
    fn counts_for(&self, uid: u32) -> bool {
        match &self.state {
            State::Lent(tenant) => tenant.uid == uid,
            State::Broken { blamed_by, .. } => *blamed_by == Some(uid),
            State::Clearing { .. } | State::Free => false,
        }
    }

    fn listed(&self) -> Listed {
        let since = self.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let (state, why) = match &self.state {
            State::Clearing { why, .. } => (Standing::Clearing, Some(why.clone()).filter(|why| !why.is_empty())),
            State::Free => (Standing::Free, None),
            State::Lent(_) => (Standing::Used, None),
            State::Broken { why, .. } => (Standing::Broken, Some(why.clone())),
        };
        let (vm, pid, uid) = match &self.state {
            State::Lent(tenant) => (Some(tenant.vm.clone()), tenant.pid, Some(tenant.uid)),
            _ => (None, None, None),
        };
        Listed { function: self.name.clone(), state, vm, pid, uid, since, why }
    }
}

#[cfg(test)]
mod tests;
