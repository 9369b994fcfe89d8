use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use testbed::certificates::{Authority, Role, of_localhost};

use super::*;
use crate::cli::with_causes;

const PATIENCE: Duration = Duration::from_secs(60);

fn spec(dir: &Path, endpoint: Endpoint) -> CredentialsSpec {
    CredentialsSpec { dir: dir.to_owned(), endpoint, verify_peer: true }
}

fn pair_of_sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (here, listener.accept().unwrap().0)
}

/// Both ends of a connection, before the handshake: the client's certificates and the server's are in these directories.
fn pair(client: &Path, server: &Path, host: &str) -> (TlsStream, TlsStream) {
    let (here, there) = pair_of_sockets();
    let client = TlsStream::client(here.into(), &spec(client, Endpoint::Client).client().unwrap(), host).unwrap();
    let server = TlsStream::server(there.into(), &spec(server, Endpoint::Server).server().unwrap()).unwrap();
    (client, server)
}

fn localhost() -> TempDir {
    let dir = TempDir::new().unwrap();
    of_localhost(dir.path()).unwrap();
    dir
}

/// What each side says of a connection: the client greets, and waits for an answer.
fn say(client: TlsStream, server: TlsStream) -> [io::Result<()>; 2] {
    let there = thread::spawn(move || {
        server.handshake(PATIENCE)?;
        let (mut reader, mut writer, _) = server.split();
        reader.read_exact(&mut [0; 5])?;
        writer.write_all(b"hello")
    });
    let (mut reader, mut writer, cut) = client.split();
    let here = writer.write_all(b"hello").and_then(|()| reader.read_exact(&mut [0; 5]));
    cut();
    [here, there.join().unwrap()]
}

fn line(result: io::Result<()>) -> String {
    let line = with_causes(&result.unwrap_err());
    assert_eq!(line.lines().count(), 1);
    line
}

#[test]
fn both_directions_are_busy_at_once_and_get_new_keys_meanwhile() {
    const BYTES: usize = 24 << 20;
    let dir = localhost();
    let (client, server) = pair(dir.path(), dir.path(), "localhost");
    let there = thread::spawn(move || server.handshake(PATIENCE).map(|()| server));
    client.handshake(PATIENCE).unwrap();
    let server = there.join().unwrap().unwrap();
    let (here, there) = (client.0.clone(), server.0.clone());
    let mut threads = Vec::new();
    for (stream, seed) in [(client, 1u8), (server, 2)] {
        let (mut reader, mut writer, _) = stream.split();
        let byte = |at: usize, seed: u8| (at.wrapping_mul(31) >> 3) as u8 ^ seed;
        threads.push(thread::spawn(move || {
            let bytes: Vec<u8> = (0..BYTES).map(|at| byte(at, seed)).collect();
            // Pieces of all sizes, some longer than what is taken at once.
            let mut left = &bytes[..];
            for len in (1..).map(|n: usize| n * 7919 % 700_000) {
                let (now, later) = left.split_at(len.min(left.len()));
                writer.write_all(now).unwrap();
                left = later;
                if left.is_empty() {
                    break;
                }
            }
        }));
        threads.push(thread::spawn(move || {
            let mut bytes = vec![0; BYTES];
            reader.read_exact(&mut bytes).unwrap();
            assert!(bytes.iter().enumerate().all(|(at, found)| *found == byte(at, 3 - seed)));
        }));
    }
    for _ in 0..20 {
        here.new_keys().unwrap();
        there.new_keys().unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn who_waits_for_bytes_keeps_nobody_from_writing_and_the_other_way_round() {
    let dir = localhost();
    let (client, server) = pair(dir.path(), dir.path(), "127.0.0.1");
    let there = thread::spawn(move || server.handshake(PATIENCE).map(|()| server));
    client.handshake(PATIENCE).unwrap();
    let server = there.join().unwrap().unwrap();
    let (mut reader, mut writer, cut) = client.split();
    let (mut of_server, mut to_client, _) = server.split();
    // The client's reader waits. Its writer writes until the other side takes no more, and waits too.
    let reads = thread::spawn(move || {
        let mut first = [0; 1];
        reader.read_exact(&mut first).unwrap();
        (first[0], reader)
    });
    let (wrote, writes) = mpsc::channel();
    let writer = thread::spawn(move || {
        let piece = vec![7; 1 << 20];
        for _ in 0..64 {
            writer.write_all(&piece).unwrap();
            _ = wrote.send(());
        }
    });
    writes.recv_timeout(PATIENCE).expect("it writes while the reader waits");
    to_client.write_all(&[9]).unwrap();
    let (first, mut reader) = reads.join().unwrap();
    assert_eq!(first, 9, "it reads while the writer waits");
    let mut all = vec![0; 64 << 20];
    of_server.read_exact(&mut all).unwrap();
    writer.join().unwrap();
    // And who is cut stops waiting.
    let waits = thread::spawn(move || reader.read(&mut [0; 1]).map(drop));
    cut();
    assert!(line(waits.join().unwrap()).contains("without a word"));
}

#[test]
fn certificates_that_are_wrong_are_told_apart_on_both_sides() {
    let ours = Authority::new("ours").unwrap();
    let others = Authority::new("others'").unwrap();
    let server = ["localhost", "127.0.0.1"];
    type Change<'a> = &'a dyn Fn(&Path, &Path) -> Result<(), Box<dyn std::error::Error>>;
    // What is done to the client's and the server's directory; what the client says then, and what the server.
    let cases: [(&str, Change<'_>, &str, &str); 9] = [
        ("nothing", &|_, _| Ok(()), "", ""),
        (
            "a server of another authority",
            &|_, there| others.signs(there, Role::Server, &server),
            "was signed by none of the authorities in",
            "knows no authority that signed this side's certificate",
        ),
        (
            "a client of another authority",
            &|here, _| others.signs(here, Role::Client, &[]),
            "knows no authority that signed this side's certificate",
            "was signed by none of the authorities in",
        ),
        (
            "an expired server",
            &|_, there| ours.signed_long_ago(there, Role::Server, &server),
            "the other side's certificate has expired",
            "says that this side's certificate",
        ),
        (
            "an expired client",
            &|here, _| ours.signed_long_ago(here, Role::Client, &[]),
            "says that this side's certificate",
            "the other side's certificate has expired",
        ),
        (
            "a server of another name",
            &|_, there| ours.signs(there, Role::Server, &["elsewhere.example"]),
            "is not for localhost but for",
            "refused this side's certificate",
        ),
        (
            "no client's certificate",
            &|here, _| {
                std::fs::remove_file(here.join("client-key.pem"))?;
                Ok(std::fs::remove_file(here.join("client-cert.pem"))?)
            },
            "demands a certificate: put client-cert.pem",
            "the other side has no certificate",
        ),
        (
            "a client's certificate at the server",
            &|_, there| {
                ours.signs(there, Role::Client, &server)?;
                std::fs::rename(there.join("client-cert.pem"), there.join("server-cert.pem"))?;
                Ok(std::fs::rename(there.join("client-key.pem"), there.join("server-key.pem"))?)
            },
            "isn't made for this",
            "refused this side's certificate",
        ),
        (
            "a revoked client",
            &|here, there| ours.revokes(here, Role::Client, &[], there),
            "was revoked",
            "was revoked, as",
        ),
    ];
    for (what, change, client_says, server_says) in cases {
        let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        for dir in [&here, &there] {
            ours.is_believed_in(dir.path()).unwrap();
        }
        ours.signs(here.path(), Role::Client, &[]).unwrap();
        ours.signs(there.path(), Role::Server, &server).unwrap();
        change(here.path(), there.path()).unwrap();
        let (client, server) = pair(here.path(), there.path(), "localhost");
        let [client, server] = say(client, server);
        if client_says.is_empty() {
            client.and(server).unwrap();
            continue;
        }
        let (client, server) = (line(client), line(server));
        assert!(client.contains(client_says), "{what}: the client says: {client}");
        assert!(server.contains(server_says), "{what}: the server says: {server}");
    }
}

#[test]
fn a_server_that_asks_for_nothing_takes_whoever_comes() {
    let dir = localhost();
    let server = CredentialsSpec { verify_peer: false, ..spec(dir.path(), Endpoint::Server) }.server().unwrap();
    std::fs::remove_file(dir.path().join("client-cert.pem")).unwrap();
    std::fs::remove_file(dir.path().join("client-key.pem")).unwrap();
    let client = spec(dir.path(), Endpoint::Client).client().unwrap();
    let (here, there) = pair_of_sockets();
    let [here, there] = say(
        TlsStream::client(here.into(), &client, "localhost").unwrap(),
        TlsStream::server(there.into(), &server).unwrap(),
    );
    here.and(there).unwrap();
}

#[test]
fn who_speaks_no_tls_is_told_apart_and_who_says_nothing_is_not_waited_for() {
    let dir = localhost();
    let server = spec(dir.path(), Endpoint::Server).server().unwrap();
    let client = spec(dir.path(), Endpoint::Client).client().unwrap();
    // To a server.
    let (mut here, there) = pair_of_sockets();
    here.write_all(b"OUTBOARD, without TLS").unwrap();
    let said = TlsStream::server(there.into(), &server).unwrap().handshake(PATIENCE);
    assert!(line(said).contains("speaks no TLS"));
    let mut alert = Vec::new();
    here.read_to_end(&mut alert).unwrap();
    assert_eq!(alert[..3], [21, 3, 3], "it is told so");
    // To a client.
    let (here, mut there) = pair_of_sockets();
    let hears =
        thread::spawn(move || TlsStream::client(here.into(), &client, "localhost").unwrap().handshake(PATIENCE));
    there.read_exact(&mut [0; 48]).unwrap();
    drop(there);
    assert!(line(hears.join().unwrap()).contains("hung up in the middle of the TLS handshake"));
    // Nothing, and almost nothing again and again.
    for drips in [false, true] {
        let (mut here, there) = pair_of_sockets();
        let stream = TlsStream::server(there.into(), &server).unwrap();
        let patience = Duration::from_millis(300);
        let hears = thread::spawn(move || stream.handshake(patience));
        // A record that announces more than ever comes.
        here.write_all(&[22, 3, 1, 64, 0, 1, 0, 63, 0]).unwrap();
        while drips && here.write_all(&[3]).is_ok() && !hears.is_finished() {
            thread::sleep(Duration::from_millis(20));
        }
        assert!(line(hears.join().unwrap()).contains("took longer than"));
    }
}

#[test]
fn what_was_changed_on_its_way_is_not_taken() {
    let dir = localhost();
    let (client, server) = pair(dir.path(), dir.path(), "localhost");
    let raw = client.0.socket().try_clone().unwrap();
    let there = thread::spawn(move || server.handshake(PATIENCE).map(|()| server));
    client.handshake(PATIENCE).unwrap();
    let (mut of_client, mut to_client, _) = there.join().unwrap().unwrap().split();
    let (mut reader, mut writer, _) = client.split();
    writer.write_all(b"sound").unwrap();
    of_client.read_exact(&mut [0; 5]).unwrap();
    // A record of nobody's.
    (&raw).write_all(&[[23, 3, 3, 0, 32].as_slice(), &[5; 32]].concat()).unwrap();
    assert!(line(of_client.read(&mut [0; 1]).map(drop)).contains("not what the other side sent"));
    // The other side is told, and nothing goes on.
    assert!(reader.read(&mut [0; 1]).is_err());
    assert!(to_client.write_all(b"more").is_err());
}

#[test]
fn files_that_are_wrong_are_named() {
    let dir = localhost();
    let broken = |name: &str, text: &str, endpoint: Endpoint| {
        let before = std::fs::read(dir.path().join(name)).ok();
        std::fs::write(dir.path().join(name), text).unwrap();
        let why = with_causes(&spec(dir.path(), endpoint).load().unwrap_err());
        match before {
            Some(before) => std::fs::write(dir.path().join(name), before).unwrap(),
            None => std::fs::remove_file(dir.path().join(name)).unwrap(),
        }
        assert!(why.contains(name) && why.lines().count() == 1, "{why}");
        why
    };
    broken("ca-cert.pem", "", Endpoint::Client);
    broken("ca-cert.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", Endpoint::Server);
    broken("ca-crl.pem", "none", Endpoint::Client);
    broken("server-cert.pem", "none", Endpoint::Server);
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    assert!(broken("client-key.pem", encrypted, Endpoint::Client).contains("decrypt it"));
    let other = localhost();
    let key = std::fs::read_to_string(other.path().join("server-key.pem")).unwrap();
    broken("server-key.pem", &key, Endpoint::Server);
    std::fs::remove_file(dir.path().join("ca-cert.pem")).unwrap();
    let why = with_causes(&spec(dir.path(), Endpoint::Server).load().unwrap_err());
    assert!(why.contains("ca-cert.pem: it can't be read"), "{why}");
    let why = with_causes(&spec(other.path(), Endpoint::Server).client().unwrap_err());
    assert!(why.contains("endpoint=client"), "{why}");
    let client = spec(other.path(), Endpoint::Client).client().unwrap();
    assert!(TlsStream::client(pair_of_sockets().0.into(), &client, "no host").is_err());
}
