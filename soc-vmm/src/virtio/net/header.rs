//! The header before a frame that the guest sends (virtio 1.2 §5.1.6.2): judged, and made anew from what was understood, so that nothing of
//! it reaches the host's kernel unseen.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
};

use crate::net::{HEADER, Offloads};

/// Bytes of an Ethernet header, and of a VLAN's tag in it.
const ETHERNET: usize = 14;
const TAG: usize = 4;
/// Where TCP's header has its own length and its checksum, and how long it is at least.
const TCP_LENGTH: usize = 12;
const TCP_CHECKSUM: u16 = 16;
const TCP: usize = 20;
/// The least that a segment carries: what the smallest MSS of Linux leaves behind all options. A frame becomes at most 8192 then.
const LEAST_SEGMENT: u16 = 8;

/// What there is to be done to a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    flags: u8,
    kind: u8,
    header_len: u16,
    segment: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl Header {
    /// Reads a header, and judges it by its frame and by what was negotiated. None: nobody could make sense of it.
    pub(super) fn read(header: &[u8; HEADER], frame: &[u8], negotiated: Offloads) -> Option<Self> {
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (flags, kind) = (u32::from(header[0]), u32::from(header[1]));
        if flags == 0 && kind == VIRTIO_NET_HDR_GSO_NONE {
            return Some(Self::default());
        }
        // Segments always need their checksums.
        if flags != VIRTIO_NET_HDR_F_NEEDS_CSUM || !negotiated.checksum {
            return None;
        }
        let (start, offset) = (word(6), word(8));
        let end = usize::from(start) + usize::from(offset) + 2;
        if usize::from(start) < ETHERNET || end > frame.len() {
            return None;
        }
        let mut this = Self { flags: header[0], checksum_start: start, checksum_offset: offset, ..Self::default() };
        if kind == VIRTIO_NET_HDR_GSO_NONE {
            // How much of a frame the kernel keeps in one piece: a hint, of which the least is right.
            this.header_len = end as u16;
            return Some(this);
        }
        let allowed = match kind & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_TCPV4 => negotiated.tso4 && tcp_v4(frame) == Some(start.into()),
            VIRTIO_NET_HDR_GSO_TCPV6 => {
                negotiated.tso6 && behind_v6(frame).is_some_and(|least| usize::from(start) >= least)
            }
            _ => false,
        };
        let ecn = kind & VIRTIO_NET_HDR_GSO_ECN != 0;
        if !allowed || ecn && !negotiated.ecn || offset != TCP_CHECKSUM || word(4) < LEAST_SEGMENT {
            return None;
        }
        let tcp = usize::from(frame[usize::from(start) + TCP_LENGTH] >> 4) * 4;
        let header_len = usize::from(start) + tcp;
        if tcp < TCP || header_len > frame.len() {
            return None;
        }
        Some(Self { kind: header[1], header_len: u16::try_from(header_len).ok()?, segment: word(4), ..this })
    }

    /// Its bytes, for one who has one buffer.
    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..2].copy_from_slice(&[self.flags, self.kind]);
        let words = [self.header_len, self.segment, self.checksum_start, self.checksum_offset];
        for (at, word) in words.into_iter().enumerate() {
            bytes[2 + 2 * at..][..2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// How many frames a frame of `len` bytes becomes.
    pub(super) fn frames(&self, len: usize) -> u64 {
        match self.segment {
            0 => 1,
            segment => len.saturating_sub(self.header_len.into()).div_ceil(segment.into()).max(1) as u64,
        }
    }
}

/// Protocol of a frame and where it begins, behind two tags at most.
fn network(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = ETHERNET;
    for _ in 0..3 {
        match u16::from_be_bytes([*frame.get(at - 2)?, *frame.get(at - 1)?]) {
            0x8100 | 0x88a8 => at += TAG,
            protocol => return Some((protocol, at)),
        }
    }
    None
}

/// Where TCP begins in a frame of IPv4.
fn tcp_v4(frame: &[u8]) -> Option<usize> {
    let (0x0800, at) = network(frame)? else { return None };
    let first = *frame.get(at)?;
    let header = usize::from(first & 0xf) * 4;
    (first >> 4 == 4 && header >= 20 && *frame.get(at + 9)? == 6).then_some(at + header)
}

/// What is at least before TCP in a frame of IPv6: extensions may follow.
fn behind_v6(frame: &[u8]) -> Option<usize> {
    let (0x86dd, at) = network(frame)? else { return None };
    (*frame.get(at)? >> 4 == 6).then_some(at + 40)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };

    /// A header and its frame: TCP over IPv4 with `payload` bytes.
    fn segments(payload: usize) -> ([u8; HEADER], Vec<u8>) {
        let mut frame = vec![0; ETHERNET + 20 + TCP + payload];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 6;
        frame[34 + TCP_LENGTH] = 0x50;
        ([1, 1, 0xff, 0xff, 100, 0, 34, 0, 16, 0, 9, 9], frame)
    }

    #[test]
    fn what_is_understood_is_told_anew() {
        let (header, frame) = segments(1000);
        let read = Header::read(&header, &frame, ALL).unwrap();
        // The length of the headers is the true one, and there is nothing in the count of buffers.
        assert_eq!(read.bytes(), [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0]);
        assert_eq!((read.frames(frame.len()), read.frames(54)), (10, 1));
        let plain = Header::read(&[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &frame, ALL).unwrap();
        assert_eq!((plain.bytes(), plain.frames(9000)), ([0; HEADER], 1));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let (good, frame) = segments(1000);
        let ip = 14;
        let with = |at: usize, value: u8| {
            let mut header = good;
            header[at] = value;
            header
        };
        let bad = [
            ("flags that are a receiver's", with(0, 3)),
            ("segments without checksums", with(0, 0)),
            ("a kind that there isn't", with(1, 7)),
            ("fragments", with(1, 3)),
            ("IPv6 that isn't", with(1, 4)),
            ("segments of 4 bytes", with(4, 4)),
            ("segments of nothing", with(4, 0)),
            ("a checksum that isn't TCP's", with(8, 6)),
            ("a start that isn't TCP's", with(6, 38)),
            ("a start past the frame", with(7, 0xff)),
            ("a place past the frame", with(9, 0xff)),
        ];
        for (what, header) in bad {
            assert_eq!(Header::read(&header, &frame, ALL), None, "{what}");
        }
        for offloads in [Offloads::NONE, Offloads { tso4: false, ..ALL }, Offloads { checksum: false, ..ALL }] {
            assert_eq!(Header::read(&good, &frame, offloads), None, "{offloads:?}");
        }
        assert_eq!(Header::read(&with(1, 0x81), &frame, Offloads { ecn: false, ..ALL }), None);
        assert!(Header::read(&with(1, 0x81), &frame, ALL).is_some());
        for (at, value) in [(12, 9), (ip, 0x65), (ip, 0x46), (ip, 0x44), (ip + 9, 17), (34 + TCP_LENGTH, 0x40)] {
            let mut frame = frame.clone();
            frame[at] = value;
            assert_eq!(Header::read(&good, &frame, ALL), None, "byte {at}");
        }
        assert_eq!(Header::read(&good, &frame[..53], ALL), None, "TCP's header is cut off");
    }

    proptest! {
        #[test]
        fn all_that_passes_is_within_its_frame(
            random: [u8; HEADER],
            mutations in proptest::collection::vec((0..HEADER, any::<u8>()), 0..3),
            payload in 0usize..3000,
            bytes in proptest::collection::vec((0usize..60, any::<u8>()), 0..3),
            cut in 0usize..200,
            is_random: bool,
        ) {
            let (mut header, mut frame) = segments(payload);
            if is_random {
                header = random;
            }
            mutations.into_iter().for_each(|(at, value)| header[at] = value);
            bytes.into_iter().filter(|(at, _)| *at < 54).for_each(|(at, value)| frame[at] = value);
            frame.truncate(frame.len() - cut.min(frame.len() - 1));
            if let Some(read) = Header::read(&header, &frame, ALL) {
                let place = usize::from(read.checksum_start) + usize::from(read.checksum_offset) + 2;
                prop_assert!(read.flags == 0 || (ETHERNET + 2..=frame.len()).contains(&place));
                prop_assert!(usize::from(read.header_len) <= frame.len());
                prop_assert_eq!(read.kind == 0, read.segment == 0);
                prop_assert!(read.frames(frame.len()) <= 8192);
                // It is as good as what it was made from.
                prop_assert_eq!(Header::read(&read.bytes(), &frame, ALL), Some(read));
            }
        }
    }
}
