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
