//! `card --directory D --functions N`: the card of docs/card.md, until it is told to end (SIGTERM, SIGINT, or its standard input closing with `--until-eof`).

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use card::Card;

const USAGE: &str = "usage: card --directory DIRECTORY [--functions N] [--until-eof]";

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(reason) => {
            eprintln!("card: {reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("card: {}: {error}", options.directory.display());
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> io::Result<()> {
    let card = Card::start(&options.directory, options.functions)?;
    println!("card: {} functions at {}", card.functions(), options.directory.display());
    io::stdout().flush()?;
    if options.until_eof {
        // Whoever started this holds the other end: it can't outlive them.
        io::copy(&mut io::stdin().lock(), &mut io::sink())?;
        return Ok(());
    }
    loop {
        std::thread::park();
    }
}

struct Options {
    directory: PathBuf,
    functions: u32,
    until_eof: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut directory, mut functions, mut until_eof) = (None, 4, false);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--directory" => directory = Some(PathBuf::from(value()?)),
                "--functions" => {
                    let value = value()?;
                    let number = value.parse().ok().filter(|number| (1..=256).contains(number));
                    functions = number.ok_or(format!("--functions {value}: 1 to 256"))?;
                }
                "--until-eof" => until_eof = true,
                other => return Err(format!("unknown argument {other}")),
            }
        }
        let directory = directory.ok_or("--directory is missing")?;
        Ok(Self { directory, functions, until_eof })
    }
}
