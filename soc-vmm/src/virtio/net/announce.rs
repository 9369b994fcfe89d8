//! How a network learns that a guest has moved: frames from its address, by which switches find it, sent here in its place. Its driver may be
//! asked to announce itself too (virtio 1.2 §5.1.6.5.4); this needs no driver that knows how.

use std::time::{Duration, Instant};

use super::filter::ADDRESS;

/// Frames, since one may be lost; and how long after the first one the second comes, and by how much more each one behind it.
const ROUNDS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(100);
/// Bytes of a frame at least, without its checksum (IEEE 802.3).
const LEAST: usize = 60;

/// Says when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Announcer {
    sent: u32,
    next: Instant,
}

impl Announcer {
    /// The first one is due now.
    pub(super) fn new(now: Instant) -> Self {
        Self { sent: 0, next: now }
    }

    /// Whether one is to be sent now, which it then is.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = !self.is_done() && self.next <= now;
        if is_due {
            self.next = now + FIRST_PAUSE + STEP * self.sent;
            self.sent += 1;
        }
        is_due
    }

    /// Whether all of them were sent.
    pub(super) fn is_done(&self) -> bool {
        self.sent >= ROUNDS
    }

    /// How long until there is something to do.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.next.saturating_duration_since(now)
    }
}

/// A frame from `mac` to everybody that asks for nothing: a RARP request for its own address (RFC 903), as hypervisors send it, which no guest
/// and no router takes for anything else.
pub(super) fn announcement(mac: [u8; ADDRESS]) -> Vec<u8> {
    const RARP: [u8; 2] = [0x80, 0x35];
    // Ethernet, IPv4, lengths of both addresses, request.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, ADDRESS as u8, 4, 0, 3];
    let nobody = &[0; 4][..];
    let mut frame = [&[0xff; ADDRESS][..], &mac, &RARP, &REQUEST, &mac, nobody, &mac, nobody].concat();
    frame.resize(LEAST, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_times_and_ever_more_rarely() {
        let start = Instant::now();
        let mut announcer = Announcer::new(start);
        let mut sent = Vec::new();
        for ms in 0..5000 {
            let now = start + Duration::from_millis(ms);
            if announcer.is_due(now) {
                sent.push(ms);
            }
        }
        assert_eq!((sent, announcer.is_done()), (vec![0, 50, 200, 450, 800], true));
    }

    #[test]
    fn an_announcement_is_a_whole_frame_with_the_address_where_switches_and_others_look() {
        let frame = announcement([2, 3, 4, 5, 6, 7]);
        assert_eq!(
            (frame.len(), &frame[..14]),
            (60, &[255, 255, 255, 255, 255, 255, 2, 3, 4, 5, 6, 7, 0x80, 0x35][..])
        );
        assert_eq!((&frame[22..28], &frame[32..38]), (&frame[6..12], &frame[6..12]));
    }
}
