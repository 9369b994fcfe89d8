//! A person at the disk's serial console, who logs in and types commands.

use std::time::Duration;

use crate::machine::Error;

use super::{PASSWORD, USER};

/// How long what needs no booting may take.
const PROMPT_LIMIT: Duration = Duration::from_secs(120);

/// Where somebody sits: a serial line of soc-vmm's own, or one behind a console of libvirt's.
pub trait Terminal {
    /// Waits until `text` has been shown, behind what was waited for before; what was shown in front of it.
    ///
    /// # Errors
    /// It isn't, within `limit`, or nobody is there any more.
    fn read_until(&mut self, text: &str, limit: Duration) -> Result<String, Error>;

    /// Types `text`.
    ///
    /// # Errors
    /// Nobody is there.
    fn type_text(&mut self, text: &str) -> Result<(), Error>;
}

/// A command's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its exit status.
    pub status: u32,
    /// What it printed to both of its streams, with lines that end in `\n`.
    pub output: String,
}

/// A shell on a serial console.
pub struct Shell<'a, 'v> {
    line: &'a mut (dyn Terminal + 'v),
    commands: u32,
}

/// A place at a shell that somebody has left, whose machine's line may be another one since.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    commands: u32,
}

impl<'a, 'v> Shell<'a, 'v> {
    /// Goes on at the shell, by the line that its machine has now.
    pub fn back(line: &'a mut (dyn Terminal + 'v), seat: Seat) -> Self {
        Self { line, commands: seat.commands }
    }

    /// Leaves it as it is.
    #[must_use]
    pub fn leave(self) -> Seat {
        Seat { commands: self.commands }
    }

    /// Waits for the login prompt, at most for `boot_limit`, and logs in.
    ///
    /// # Errors
    /// No prompt, or no shell behind it.
    pub fn log_in(line: &'a mut (dyn Terminal + 'v), boot_limit: Duration) -> Result<Self, Error> {
        line.read_until("login: ", boot_limit)?;
        line.type_text(&format!("{USER}\n"))?;
        line.read_until("Password: ", PROMPT_LIMIT)?;
        line.type_text(&format!("{PASSWORD}\n"))?;
        line.read_until("# ", PROMPT_LIMIT)?;
        // A shell that neither edits lines nor prompts, on a terminal that neither echoes nor changes what is printed.
        line.type_text("exec sh\n")?;
        line.read_until("# ", PROMPT_LIMIT)?;
        line.type_text("stty -echo -onlcr; PS1= PS2=\n")?;
        let mut shell = Self { line, commands: 0 };
        // What the terminal still echoed ends with this.
        shell.run("true", PROMPT_LIMIT)?;
        Ok(shell)
    }

    /// Runs `command`, one line, to its end.
    ///
    /// # Errors
    /// It doesn't end within `limit`, or the VM does.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Answer, Error> {
        self.commands += 1;
        let number = self.commands;
        // The line as it is typed doesn't hold the mark that it prints.
        self.line.type_text(&format!("{{ {command}\n}} 2>&1 </dev/null; printf 'ended%s{number} %d\\n' - $?\n"))?;
        let output = self.line.read_until(&format!("ended-{number} "), limit)?;
        let status = self.line.read_until("\n", PROMPT_LIMIT)?;
        // 256 is no status: whoever compares it with one sees what is wrong.
        Ok(Answer { status: status.trim().parse().unwrap_or(256), output })
    }

    /// Types a line after which the shell won't answer, like one that switches the machine off.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn last(self, line: &str) -> Result<(), Error> {
        self.line.type_text(&format!("{line}\n"))
    }
}
