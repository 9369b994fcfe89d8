//! What a driver has agreed on and a device here doesn't offer, by the names of the specification.

use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_VSOCK,
};

/// Names of bits, as lines that say what is missing.
macro_rules! lines {
    ($($bit:literal $name:literal),* $(,)?) => {
        &[$(($bit, concat!("its driver uses ", $name, ", which isn't offered here: start this machine with the source's options and back ends"))),*]
    };
}

type Lines = &'static [(u32, &'static str)];

/// Reserved features (virtio 1.2 §6).
const RESERVED: Lines = lines![
    28 "VIRTIO_F_INDIRECT_DESC", 29 "VIRTIO_F_EVENT_IDX", 32 "VIRTIO_F_VERSION_1", 33 "VIRTIO_F_ACCESS_PLATFORM",
    34 "VIRTIO_F_RING_PACKED", 35 "VIRTIO_F_IN_ORDER", 36 "VIRTIO_F_ORDER_PLATFORM", 37 "VIRTIO_F_SR_IOV",
    38 "VIRTIO_F_NOTIFICATION_DATA", 39 "VIRTIO_F_NOTIF_CONFIG_DATA", 40 "VIRTIO_F_RING_RESET",
];

/// A network interface's (§5.1.3).
const NET: Lines = lines![
    0 "VIRTIO_NET_F_CSUM", 1 "VIRTIO_NET_F_GUEST_CSUM", 2 "VIRTIO_NET_F_CTRL_GUEST_OFFLOADS", 3 "VIRTIO_NET_F_MTU",
    5 "VIRTIO_NET_F_MAC", 7 "VIRTIO_NET_F_GUEST_TSO4", 8 "VIRTIO_NET_F_GUEST_TSO6", 9 "VIRTIO_NET_F_GUEST_ECN",
    10 "VIRTIO_NET_F_GUEST_UFO", 11 "VIRTIO_NET_F_HOST_TSO4", 12 "VIRTIO_NET_F_HOST_TSO6", 13 "VIRTIO_NET_F_HOST_ECN",
    14 "VIRTIO_NET_F_HOST_UFO", 15 "VIRTIO_NET_F_MRG_RXBUF", 16 "VIRTIO_NET_F_STATUS", 17 "VIRTIO_NET_F_CTRL_VQ",
    18 "VIRTIO_NET_F_CTRL_RX", 19 "VIRTIO_NET_F_CTRL_VLAN", 20 "VIRTIO_NET_F_CTRL_RX_EXTRA",
    21 "VIRTIO_NET_F_GUEST_ANNOUNCE", 22 "VIRTIO_NET_F_MQ", 23 "VIRTIO_NET_F_CTRL_MAC_ADDR",
];

/// A disk's (§5.2.3).
const BLOCK: Lines = lines![
    1 "VIRTIO_BLK_F_SIZE_MAX", 2 "VIRTIO_BLK_F_SEG_MAX", 4 "VIRTIO_BLK_F_GEOMETRY", 5 "VIRTIO_BLK_F_RO",
    6 "VIRTIO_BLK_F_BLK_SIZE", 9 "VIRTIO_BLK_F_FLUSH", 10 "VIRTIO_BLK_F_TOPOLOGY", 11 "VIRTIO_BLK_F_CONFIG_WCE",
    12 "VIRTIO_BLK_F_MQ", 13 "VIRTIO_BLK_F_DISCARD", 14 "VIRTIO_BLK_F_WRITE_ZEROES",
];

/// A console's (§5.3.3).
const CONSOLE: Lines =
    lines![0 "VIRTIO_CONSOLE_F_SIZE", 1 "VIRTIO_CONSOLE_F_MULTIPORT", 2 "VIRTIO_CONSOLE_F_EMERG_WRITE"];

/// A balloon's (§5.5.3).
const BALLOON: Lines = lines![
    0 "VIRTIO_BALLOON_F_MUST_TELL_HOST", 1 "VIRTIO_BALLOON_F_STATS_VQ", 2 "VIRTIO_BALLOON_F_DEFLATE_ON_OOM",
    3 "VIRTIO_BALLOON_F_FREE_PAGE_HINT", 4 "VIRTIO_BALLOON_F_PAGE_POISON", 5 "VIRTIO_BALLOON_F_PAGE_REPORTING",
];

/// A socket device's (§5.10.3).
const VSOCK: Lines = lines![0 "VIRTIO_VSOCK_F_STREAM", 1 "VIRTIO_VSOCK_F_SEQPACKET"];

/// Names the lowest of the features `missing` from a device of that kind (§5), in a line; none: nothing is missing.
pub(super) fn of(kind: u32, missing: u64) -> Option<&'static str> {
    let bit = (missing != 0).then(|| missing.trailing_zeros())?;
    let own = match kind {
        VIRTIO_ID_NET => NET,
        VIRTIO_ID_BLOCK => BLOCK,
        VIRTIO_ID_CONSOLE => CONSOLE,
        VIRTIO_ID_BALLOON => BALLOON,
        VIRTIO_ID_VSOCK => VSOCK,
        _ => &[],
    };
    let line = own.iter().chain(RESERVED).find(|(of, _)| *of == bit).map(|(_, line)| *line);
    Some(line.unwrap_or("its driver uses a feature that no virtio device has here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_as_its_device_has_it() {
        let starts = |kind, missing, name: &str| {
            let line = of(kind, missing).unwrap();
            assert!(line.starts_with(&format!("its driver uses {name}")), "{line}");
        };
        assert_eq!(of(VIRTIO_ID_BLOCK, 0), None);
        starts(VIRTIO_ID_BLOCK, 1 << 9 | 1 << 29, "VIRTIO_BLK_F_FLUSH,");
        starts(VIRTIO_ID_NET, 1 << 9, "VIRTIO_NET_F_GUEST_ECN,");
        starts(VIRTIO_ID_VSOCK, 1 << 34, "VIRTIO_F_RING_PACKED,");
        starts(VIRTIO_ID_VSOCK, 1 << 63, "a feature");
    }
}
