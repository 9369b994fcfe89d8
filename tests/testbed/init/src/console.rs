//! A person at the machine's console: a few words, and programs in the foreground.

use std::io::{BufRead, Write};

use testbed_init::Request;

use crate::calls::answer;
use crate::programs::Programs;
use crate::{boot, inspect};

const HELP: &str = "\
list                 every process
inventory            processors, memory, PCI functions
memory PID           private memory of a process
threads PID          threads of a process and their CPU time
kill PID             ends a process
read FILE            shows a file
bind FUNCTION        gives a PCI function to vfio-pci
poweroff             switches the machine off
PROGRAM [ARGUMENT…]  runs a program of /bin on this console, until it ends";

/// Takes lines from the console for as long as the machine is up.
pub(crate) fn serve(programs: &Programs) {
    let mut lines = std::io::stdin().lock().lines();
    loop {
        print!("# ");
        let _ = std::io::stdout().flush();
        // A console has no end; where it can't be read there is nobody to serve.
        let Some(Ok(line)) = lines.next() else { return };
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            ["help"] => println!("{HELP}"),
            ["poweroff"] => {
                boot::power_off();
            }
            words => match request(words) {
                Some(request) => match answer(request, programs) {
                    Ok(answer) => println!("{answer:#?}"),
                    Err(error) => println!("{error}"),
                },
                None => run(words, programs),
            },
        }
    }
}

fn request(words: &[&str]) -> Option<Request> {
    const SIGTERM: i32 = 15;
    Some(match *words {
        ["list"] => Request::List,
        ["inventory"] => Request::Inventory,
        ["memory", pid] => Request::Memory { pid: pid.parse().ok()? },
        ["threads", pid] => Request::Threads { pid: pid.parse().ok()? },
        ["kill", pid] => Request::Signal { pid: pid.parse().ok()?, signal: SIGTERM },
        ["read", path] => Request::Read { path: path.to_owned() },
        ["bind", function] => Request::Bind { function: function.to_owned() },
        _ => return None,
    })
}

fn run(words: &[&str], programs: &Programs) {
    let program = if words[0].starts_with('/') { words[0].to_owned() } else { format!("/bin/{}", words[0]) };
    if !inspect::is_program(&program) {
        println!("{}: neither a word (see help) nor a program", words[0]);
        return;
    }
    match programs.foreground(&program, &words[1..]) {
        Ok(status) => println!("{status:?}"),
        Err(error) => println!("{error}"),
    }
}
