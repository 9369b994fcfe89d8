//! A Debian at work, in a way that shows what a move does to it: it writes its disk and reads it back, talks over one TCP connection, keeps
//! memory that it wrote once, and looks at its clock without a pause.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::clock::Ahead;
use crate::machine::Error;

use super::{Passt, Shell};

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Where its programs are, and leave what they have done.
const PLACE: &str = "/dev/shm/work";
/// MiB of memory that it writes once.
const KEPT_MIB: u32 = 64;

/// Writes 256 KiB of random bytes again and again, and reads them from the disk.
const DISK: &str = r#"n=0
while [ ! -e stop ]; do
    head -c 262144 /dev/urandom >one && dd if=one of=/var/tmp/work bs=64k conv=fsync 2>/dev/null &&
        dd if=/var/tmp/work bs=64k iflag=direct 2>/dev/null | busybox cmp -s - one || { echo broken >disk; exit; }
    n=$((n + 1)); echo $n >disk.new; mv disk.new disk
    sleep 0.1
done
"#;
/// Says a number, and hears it, over one connection.
const NETWORK: &str = r#"n=0
exec 3<>/dev/tcp/$1/$2 || { echo broken >network; exit; }
while [ ! -e stop ]; do
    echo $n >&3; read -t 60 heard <&3
    [ "$heard" = $n ] || { echo broken >network; exit; }
    n=$((n + 1)); echo $n >network.new; mv network.new network
    sleep 0.02
done
"#;
/// The longest time from one look at the clock to the next one, in µs, since it was asked last.
const CLOCK: &str = r#"most=0; last=${EPOCHREALTIME/./}
trap 'echo $most >gap.new; mv gap.new gap; most=0' USR1
echo 0 >clock
while [ ! -e stop ]; do
    now=${EPOCHREALTIME/./}
    [ $now -ge $last ] || { echo the clock went back from $last to $now; exit; }
    [ $((now - last)) -gt $most ] && most=$((now - last))
    last=$now
done
"#;

/// How nice the one at the clock is: nobody else shall keep it from looking.
const AT_ONCE: i32 = -19;

/// What a Debian has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Times that the disk was written and read.
    pub disk: u64,
    /// Numbers that went out and came back.
    pub network: u64,
}

/// Sets it to work. Its connection goes to [`Echo`], by passt.
///
/// # Errors
/// A command fails, or the terminal's VM is gone.
pub fn begin(shell: &mut Shell<'_, '_>, echo: &Echo) -> Result<(), Error> {
    succeed(
        shell,
        "ip link set lo up; for n in /sys/class/net/e*; do n=${n##*/}; ip link set $n up && udhcpc -n -q -t 20 -i $n; done",
    )?;
    succeed(
        shell,
        &format!("mkdir -p {PLACE} && cd {PLACE} && head -c {KEPT_MIB}M /dev/urandom >kept && sha256sum kept >sum"),
    )?;
    for (name, nice, text) in [("disk", 0, DISK), ("network", 0, NETWORK), ("clock", AT_ONCE, CLOCK)] {
        // A line a command: the shell takes one at a time.
        for line in text.lines() {
            let line = line.replace('\'', r"'\''");
            succeed(shell, &format!("echo '{line}' >>{name}.sh"))?;
        }
        let (host, port) = (Passt::HOST, echo.port);
        succeed(
            shell,
            &format!("(nice -n {nice} bash {name}.sh {host} {port} >{name}.said 2>&1 & echo $! >{name}.pid)"),
        )?;
        succeed(shell, &wait_for(&format!("test -s {name}")))?;
    }
    Ok(())
}

/// What it has done so far.
///
/// # Errors
/// Something broke: what was read is not what was written, or heard not what was said.
pub fn done(shell: &mut Shell<'_, '_>) -> Result<Done, Error> {
    let said = succeed(shell, &format!("cat {PLACE}/disk {PLACE}/network"))?;
    let mut numbers = said.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(disk)), Some(Ok(network))) => Ok(Done { disk, network }),
        _ => Err(refused("what it has done", &said)),
    }
}

/// Waits until it has done more than `before` with its disk and its network, and looks at the memory that it keeps.
///
/// # Errors
/// As [`done`]; or memory has changed.
pub fn goes_on(shell: &mut Shell<'_, '_>, before: Done) -> Result<Done, Error> {
    let Done { disk, network } = before;
    let both = format!("! test $(cat {PLACE}/disk) -le {disk} -o $(cat {PLACE}/network) -le {network}");
    succeed(shell, &wait_for(&both))?;
    succeed(shell, &format!("cd {PLACE} && sha256sum -c sum"))?;
    done(shell)
}

/// The longest time that its clock was not looked at, since the last call.
///
/// # Errors
/// The program is gone: the clock went back.
pub fn gap(shell: &mut Shell<'_, '_>) -> Result<Duration, Error> {
    let asks = format!(
        "cd {PLACE}; rm -f gap; kill -USR1 $(cat clock.pid) && {}; cat gap || {{ cat clock.said; false; }}",
        wait_for("test -s gap")
    );
    let said = succeed(shell, &asks)?;
    said.trim().parse().map(Duration::from_micros).map_err(|_| refused("the clock's gap", &said))
}

/// How far its clock is ahead of this machine's.
///
/// # Errors
/// It says no time.
pub fn clock(shell: &mut Shell<'_, '_>) -> Result<Ahead, Error> {
    Ahead::of(|| {
        let said = succeed(shell, "date +%s%N")?;
        said.trim().parse().map_err(|_| refused("the guest's clock", &said))
    })
}

/// Has it end its work.
///
/// # Errors
/// It is gone.
pub fn end(shell: &mut Shell<'_, '_>) -> Result<(), Error> {
    succeed(shell, &format!("touch {PLACE}/stop")).map(drop)
}

fn wait_for(condition: &str) -> String {
    format!("n=0; until {condition} || [ $n -ge 600 ]; do n=$((n+1)); sleep 0.1; done; {condition}")
}

fn succeed(shell: &mut Shell<'_, '_>, command: &str) -> Result<String, Error> {
    let answer = shell.run(command, LIMIT)?;
    if answer.status == 0 { Ok(answer.output) } else { Err(refused(command, &answer.output)) }
}

fn refused(what: &str, said: &str) -> Error {
    Error::file(what)(io::Error::other(said.to_owned()))
}

/// Somebody on this machine who says each line back. It ends with this handle.
#[derive(Debug)]
pub struct Echo {
    port: u16,
    is_over: Arc<AtomicBool>,
}

impl Echo {
    /// Listens on the loopback interface.
    ///
    /// # Errors
    /// No port can be had.
    pub fn start() -> Result<Self, Error> {
        let failed = Error::file("a port of 127.0.0.1");
        let listened = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| Ok((l.local_addr()?.port(), l)));
        let (port, listener) = listened.map_err(failed)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_over);
        thread::spawn(move || {
            for client in listener.incoming() {
                if told.load(Ordering::Relaxed) {
                    return;
                }
                // Whoever goes is not missed.
                thread::spawn(move || client.and_then(say_back));
            }
        });
        Ok(Self { port, is_over })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // Whoever waits for a client gets one.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

fn say_back(stream: TcpStream) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        writer.write_all(line.as_bytes())?;
        line.clear();
    }
    Ok(())
}
