//! The control socket: a line in, a line out (docs/card.md §6).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::function::{Function, Link};
use crate::misbehaviour::{Dma, Doorbell};

/// The longest line that is read.
const LINE_MAX: u64 = 256;

/// What a line asks of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Link(bool),
    Remove,
    Reset,
    Doorbell(Doorbell),
    LoseVectors(bool),
    Dma(Dma),
    Stats,
}

/// Serves the socket for as long as the process lives.
pub(crate) fn serve(functions: Arc<[Arc<Function>]>, path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let functions = Arc::clone(&functions);
            std::thread::spawn(move || {
                // A client that goes away in the middle has had what it wanted.
                let _ = converse(&functions, &stream);
            });
        }
    })?;
    Ok(())
}

fn converse(functions: &[Arc<Function>], mut stream: &UnixStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.by_ref().take(LINE_MAX).read_line(&mut line)? != 0 {
        let answer = match parse(line.trim()) {
            Ok((number, command)) => match functions.get(number) {
                Some(function) => run(function, command),
                None => format!("error there is no function {number}"),
            },
            Err(reason) => format!("error {reason}"),
        };
        writeln!(stream, "{answer}")?;
        line.clear();
    }
    Ok(())
}

/// Carries out a command; what to answer.
pub(crate) fn run(function: &Function, command: Command) -> String {
    match command {
        Command::Link(up) => function.set_link(up),
        Command::Remove => function.remove(),
        Command::Reset => function.reset(Link::Host),
        Command::Doorbell(doorbell) => function.misbehave(|how| how.doorbell = doorbell),
        Command::LoseVectors(lose) => function.misbehave(|how| how.vectors_lost = lose),
        Command::Dma(dma) => function.misbehave(|how| how.dma = dma),
        Command::Stats => return function.stats().to_string(),
    }
    "ok".into()
}

fn parse(line: &str) -> Result<(usize, Command), String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [verb, number, rest @ ..] = words.as_slice() else {
        return Err("expected: VERB FUNCTION [WHAT]".into());
    };
    let number = number.parse().map_err(|_| format!("`{number}` is no function number"))?;
    let time =
        |text: &str, unit: fn(u64) -> Duration| text.parse().map(unit).map_err(|_| format!("`{text}` is no number"));
    let command = match (*verb, rest) {
        ("link", ["up"]) => Command::Link(true),
        ("link", ["down"]) => Command::Link(false),
        ("remove", []) => Command::Remove,
        ("reset", []) => Command::Reset,
        ("doorbell", ["normal"]) => Command::Doorbell(Doorbell::Normal),
        ("doorbell", ["drop"]) => Command::Doorbell(Doorbell::Drop),
        ("doorbell", ["double"]) => Command::Doorbell(Doorbell::Double),
        ("doorbell", ["delay", ms]) => Command::Doorbell(Doorbell::Delay(time(ms, Duration::from_millis)?)),
        ("vector", ["normal"]) => Command::LoseVectors(false),
        ("vector", ["drop"]) => Command::LoseVectors(true),
        ("dma", ["normal"]) => Command::Dma(Dma::Normal),
        ("dma", ["fault"]) => Command::Dma(Dma::Fault),
        ("dma", ["torn"]) => Command::Dma(Dma::Torn),
        ("dma", ["slow", us]) => Command::Dma(Dma::Slow(time(us, Duration::from_micros)?)),
        ("dma", ["split", ms]) => Command::Dma(Dma::Split(time(ms, Duration::from_millis)?)),
        ("stats", []) => Command::Stats,
        _ => return Err(format!("`{line}` is not understood")),
    };
    Ok((number, command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood_or_refused() {
        let cases = [
            ("link 0 down", Some((0, Command::Link(false)))),
            ("link 12 up", Some((12, Command::Link(true)))),
            ("remove 1", Some((1, Command::Remove))),
            ("doorbell 2 delay 30", Some((2, Command::Doorbell(Doorbell::Delay(Duration::from_millis(30)))))),
            ("vector 2 drop", Some((2, Command::LoseVectors(true)))),
            ("dma 3 slow 7", Some((3, Command::Dma(Dma::Slow(Duration::from_micros(7)))))),
            ("stats 4", Some((4, Command::Stats))),
            ("", None),
            ("link", None),
            ("link x up", None),
            ("link 0 sideways", None),
            ("dma 0 slow", None),
            ("dma 0 slow soon", None),
            ("remove 1 2", None),
        ];
        for (line, expected) in cases {
            assert_eq!(parse(line).ok(), expected, "{line}");
        }
    }
}
