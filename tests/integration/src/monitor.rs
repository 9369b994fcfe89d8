//! A client that speaks QMP as libvirt does. All it hears, and all it says in earnest, is as the schema reports.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::qapi_schema::Schema;

/// How long an answer may take: an emulated guest starves where much else runs.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    /// Those that came while something else was waited for.
    events: Vec<Value>,
    /// What it reports, once it was asked.
    schema: Option<Schema>,
    asked: u64,
}

impl Monitor {
    /// Connects to a control socket, negotiates, and asks for the schema.
    ///
    /// # Panics
    /// Nobody answers there, or not as a monitor.
    pub fn connect(socket: &Path) -> Self {
        // Its socket may be there a moment before somebody listens.
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                connected => break connected.expect("the monitor listens"),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let mut monitor = Self { stream: BufReader::new(stream), events: Vec::new(), schema: None, asked: 0 };
        let greeting = monitor.receive();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        assert_eq!(monitor.does("qmp_capabilities", json!({})), json!({}));
        let reported = monitor.does("query-qmp-schema", json!({}));
        monitor.schema = Some(Schema::read(&reported).expect("a schema"));
        monitor
    }

    /// Executes a command; what it returns.
    ///
    /// # Panics
    /// It is refused, or one of both isn't as reported.
    #[expect(clippy::needless_pass_by_value, reason = "arguments are written where they are passed")]
    pub fn does(&mut self, command: &str, arguments: Value) -> Value {
        let (sent, reply) = self.execute(command, &arguments);
        if let Some(schema) = &self.schema {
            schema.check_command(&sent).unwrap_or_else(|why| panic!("{why}"));
        }
        reply.get("return").unwrap_or_else(|| panic!("{command}: {reply}")).clone()
    }

    /// Executes a command that is refused, and may well be wrong; why.
    ///
    /// # Panics
    /// It isn't, or not as reported.
    #[expect(clippy::needless_pass_by_value, reason = "likewise")]
    pub fn refuses(&mut self, command: &str, arguments: Value) -> String {
        let (_, reply) = self.execute(command, &arguments);
        reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command}: {reply}")).to_owned()
    }

    /// Executes a command that may be refused, and may be wrong; the whole reply.
    ///
    /// # Panics
    /// It isn't as reported.
    #[expect(clippy::needless_pass_by_value, reason = "likewise")]
    pub fn replies(&mut self, command: &str, arguments: Value) -> Value {
        self.execute(command, &arguments).1
    }

    /// The data of the next event of that name.
    ///
    /// # Panics
    /// None comes, or it isn't as reported.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let mut message = if self.events.is_empty() { self.receive() } else { self.events.remove(0) };
            if message["event"] == name {
                return message["data"].take();
            }
        }
    }

    /// Whether an event of that name and with such data came already, and was not asked for.
    pub fn has_heard(&self, name: &str, is_meant: impl Fn(&Value) -> bool) -> bool {
        self.events.iter().any(|event| event["event"] == name && is_meant(&event["data"]))
    }

    /// Says a line as it is.
    ///
    /// # Errors
    /// Nobody is there any more.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        self.stream.get_mut().write_all(line.as_bytes())
    }

    /// The devices that have names, and what they are.
    ///
    /// # Panics
    /// As [`Self::does`].
    pub fn peripherals(&mut self) -> Vec<String> {
        let all = self.does("qom-list", json!({"path": "/machine/peripheral"}));
        let entry = |entry: &Value| {
            format!("{} {}", entry["name"].as_str().unwrap_or("?"), entry["type"].as_str().unwrap_or("?"))
        };
        all.as_array().expect("a list").iter().map(entry).collect()
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> (Value, Value) {
        self.asked += 1;
        let sent = json!({ "execute": command, "arguments": arguments, "id": format!("asked-{}", self.asked) });
        self.stream.get_mut().write_all(format!("{sent}\n").as_bytes()).expect(command);
        loop {
            let message = self.receive();
            if message.get("event").is_some() {
                self.events.push(message);
                continue;
            }
            if let Some(schema) = &self.schema {
                schema.check_answer(&sent, &message).unwrap_or_else(|why| panic!("{why}"));
            }
            return (sent, message);
        }
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("the monitor answers");
        let message: Value = serde_json::from_str(&line).unwrap_or_else(|why| panic!("{why} in {line:?}"));
        if let (Some(schema), Some(_)) = (&self.schema, message.get("event")) {
            schema.check_event(&message).unwrap_or_else(|why| panic!("{why}"));
        }
        message
    }
}
