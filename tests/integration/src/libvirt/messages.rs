//! Every message between libvirtd and its emulators, as its debug log has them.

use std::collections::HashMap;

use serde_json::Value;

use crate::qapi_schema::Schema;

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

/// Checks every message of a log against the schema that soc-vmm reports in it.
///
/// # Panics
/// One isn't as reported.
pub fn check_messages(log: &str) {
    let messages = messages(log);
    let reported = messages.windows(2).find_map(|pair| match pair {
        [Message::Sent(_, sent), Message::Answered(_, answer)] if sent["execute"] == "query-qmp-schema" => {
            Some(answer["return"].clone())
        }
        _ => None,
    });
    let schema = Schema::read(&reported.expect("libvirtd asks for the schema")).expect("a schema");
    let mut sent_to: HashMap<&str, &Value> = HashMap::new();
    let mut wrong = Vec::new();
    for message in &messages {
        let checked = match message {
            Message::Sent(monitor, sent) => {
                sent_to.insert(monitor, sent);
                // What isn't there may be asked for: it is answered so.
                if schema.has_command(sent["execute"].as_str().unwrap_or_default()) {
                    schema.check_command(sent)
                } else {
                    Ok(())
                }
            }
            Message::Answered(monitor, answer) => match sent_to.get(monitor.as_str()) {
                Some(sent) => schema.check_answer(sent, answer),
                None => Err(format!("an answer to nothing: {answer}")),
            },
            Message::Told(_, event) => schema.check_event(event),
        };
        wrong.extend(checked.err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(messages.len() > 20, "{} messages", messages.len());
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
        // Behind it the log may go on.
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_are_found_in_what_libvirtd_logs() {
        let log = "\
2026-11-21 13:00:34.384+0000: 71: info : qemuMonitorSend:861 : QEMU_MONITOR_SEND_MSG: mon=0x7f01 msg={\"execute\":\"stop\",\"id\":\"libvirt-7\"}
 fd=-1
2026-11-21 13:00:34.384+0000: 99: info : qemuMonitorIOWrite:366 : QEMU_MONITOR_IO_WRITE: mon=0x7f01 buf={\"execute\":\"stop\"} len=40
2026-11-21 13:00:34.385+0000: 99: info : qemuMonitorJSONIOProcessLine:203 : QEMU_MONITOR_RECV_EVENT: mon=0x7f01 event={\"event\": \"STOP\"}
2026-11-21 13:00:34.385+0000: 99: info : qemuMonitorJSONIOProcessLine:208 : QEMU_MONITOR_RECV_REPLY: mon=0x7f01 reply={\"return\": {}, \"id\": \"libvirt-7\"}
2026-11-21 13:00:34.386+0000: 99: error : qemuMonitorIORead:423 : Unable to read from monitor";
        let monitor = || "0x7f01".to_owned();
        let wanted = [
            Message::Sent(monitor(), json!({"execute": "stop", "id": "libvirt-7"})),
            Message::Told(monitor(), json!({"event": "STOP"})),
            Message::Answered(monitor(), json!({"return": {}, "id": "libvirt-7"})),
        ];
        assert_eq!(messages(log), wanted);
    }
}
