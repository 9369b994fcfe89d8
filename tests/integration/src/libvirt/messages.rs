//! Every message between libvirtd and its emulators, as its debug log has them.

use serde_json::Value;

/// Where one went.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// libvirtd's, to a monitor (a connection has one name throughout).
    Sent(String, Value),
    /// A monitor's answer.
    Answered(String, Value),
    /// A monitor's event.
    Told(String, Value),
}

/// The messages of a log, in order.
#[must_use]
pub fn messages(log: &str) -> Vec<Message> {
    log.lines().filter_map(message).collect()
}

fn message(line: &str) -> Option<Message> {
    let after = |mark: &str, field: &str| {
        let rest = &line[line.find(mark)? + mark.len()..];
        let (monitor, rest) = rest.trim_start().strip_prefix("mon=")?.split_once(' ')?;
        let json = &rest[rest.find(field)? + field.len()..];
        // Behind it the log goes on: `\n` in two characters, or ` fd=-1`.
        let value = serde_json::Deserializer::from_str(json).into_iter().next()?.ok()?;
        Some((monitor.to_owned(), value))
    };
    if let Some((monitor, value)) = after("QEMU_MONITOR_SEND_MSG:", "msg=") {
        return Some(Message::Sent(monitor, value));
    }
    if let Some((monitor, value)) = after("QEMU_MONITOR_RECV_REPLY:", "reply=") {
        return Some(Message::Answered(monitor, value));
    }
    let (monitor, value) = after("QEMU_MONITOR_RECV_EVENT:", "event=")?;
    Some(Message::Told(monitor, value))
}
