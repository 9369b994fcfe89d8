//! A person at the machine's console: a few words, and programs in the foreground.

use std::io::{BufRead, Write};

use testbed_init::{Answer, Inventory, Request};

use crate::calls::answer;
use crate::programs::Programs;
use crate::{boot, inspect};

const HELP: &str = "\
list                 every process
inventory            processors, memory, PCI functions
memory PID           private memory of a process
threads PID          threads of a process and their CPU time
open PID             what a process has open
kill PID             ends a process
read FILE            shows a file
clock                what its clock says
bind FUNCTION        gives a PCI function to vfio-pci
poweroff             switches the machine off
start PROGRAM [ARGUMENT…]  starts a program of /bin beside this console: host-kvm-shim --function pci:FUNCTION
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
                    Ok(answer) => show(&answer),
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
        ["open", pid] => Request::Descriptors { pid: pid.parse().ok()? },
        ["clock"] => Request::Clock,
        ["kill", pid] => Request::Signal { pid: pid.parse().ok()?, signal: SIGTERM },
        ["read", path] => Request::Read { path: path.to_owned() },
        ["start", program, ref args @ ..] => Request::Run {
            program: path_of(program),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            channel: None,
        },
        ["bind", function] => Request::Bind { function: function.to_owned() },
        _ => return None,
    })
}

/// What a person reads of an answer.
fn show(answer: &Answer) {
    match answer {
        Answer::Done => println!("done"),
        Answer::Inventory(inventory) => show_inventory(inventory),
        Answer::Programs(programs) => programs.iter().for_each(|p| println!("{:>6}  {}", p.pid, p.command.join(" "))),
        Answer::Pid(pid) => println!("process {pid}"),
        Answer::Ended(ended) => println!("{:?}\n{}{}", ended.status, ended.stdout, ended.stderr),
        Answer::Memory(memory) => {
            memory.private.iter().for_each(|m| println!("{:>8} KiB private  {}", m.kib, m.name));
            println!(
                "{:>8} KiB private in all, {} resident, {} page tables",
                memory.private_kib(),
                memory.resident,
                memory.page_tables
            );
        }
        Answer::Threads(threads) => {
            threads.iter().for_each(|t| {
                println!("{:>6}  {:<16} {:>14} ns run, {} ms in the guest", t.tid, t.name, t.run_ns, t.guest_ms);
            });
        }
        Answer::Descriptors(open) => open.iter().for_each(|target| println!("{target}")),
        Answer::Clock(nanoseconds) => println!("{nanoseconds} ns since 1970"),
        Answer::Text(text) => print!("{text}"),
    }
}

fn show_inventory(inventory: &Inventory) {
    let Inventory { cpu, memory_kib, hugepages, nodes, pci, kvm, nested_paging } = inventory;
    println!("{} processors, {} {}", cpu.count, cpu.vendor, cpu.model);
    println!("{memory_kib} KiB of memory, {hugepages} huge pages of 2 MiB");
    println!("/dev/kvm: {kvm}, nested paging: {nested_paging}");
    nodes.iter().for_each(|node| println!("node {}: processors {}, {} KiB", node.id, node.cpus, node.memory_kib));
    for function in pci {
        let group = function.iommu_group.map_or_else(|| "-".to_owned(), |group| group.to_string());
        let (id, driver) = (function.id, function.driver.as_deref().unwrap_or("-"));
        println!(
            "{}  {:04x}:{:04x}  class {:06x}  group {group:<3} {driver}",
            function.address, id.vendor, id.device, function.class
        );
    }
}

fn path_of(program: &str) -> String {
    if program.starts_with('/') { program.to_owned() } else { format!("/bin/{program}") }
}

fn run(words: &[&str], programs: &Programs) {
    let program = path_of(words[0]);
    if !inspect::is_program(&program) {
        let known = HELP.lines().find(|line| line.split_whitespace().next() == Some(words[0]));
        println!("{}", known.unwrap_or("neither a word (see help) nor a program of /bin"));
        return;
    }
    match programs.foreground(&program, &words[1..]) {
        Ok(status) => println!("{status:?}"),
        Err(error) => println!("{error}"),
    }
}
