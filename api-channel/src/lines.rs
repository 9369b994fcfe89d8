//! Words of the channel outside its rings, in the regions *host lines* (card memory, the host writes) and *SoC lines* (inbox, the
//! SoC writes). Offsets are in bytes from the region's start; every word has a line of its own.

/// Words that the host writes.
pub mod host {
    /// All of them but the epoch.
    pub(crate) const ALL: [usize; 4] = [HEARTBEAT, REPLIES_TAIL, EVENTS_TAIL, REQUESTS_HEAD];
    /// Heartbeat: grows about once a second.
    pub const HEARTBEAT: usize = 0;
    /// Tail of the reply ring, in slots since the start.
    pub const REPLIES_TAIL: usize = 64;
    /// Tail of the event ring, in slots since the start.
    pub const EVENTS_TAIL: usize = 128;
    /// Head of the SoC's request ring, in slots since the start.
    pub const REQUESTS_HEAD: usize = 192;
    /// The epoch that the words above are of, stored once they are zero: before that they may be another connection's.
    pub const EPOCH: usize = 256;
}

/// Words that the SoC writes. The first line is the SoC header.
pub mod soc {
    /// All of them.
    pub(crate) const ALL: [usize; 6] = [HEARTBEAT, REQUESTS_TAIL, REPLIES_HEAD, EVENTS_HEAD, LANES_IDLE, BULK_FETCHED];
    /// Heartbeat: grows about once a second.
    pub const HEARTBEAT: usize = 64;
    /// Tail of the request ring, in slots since the start.
    pub const REQUESTS_TAIL: usize = 128;
    /// Head of the host's reply ring, in slots since the start.
    pub const REPLIES_HEAD: usize = 192;
    /// Head of the host's event ring, in slots since the start.
    pub const EVENTS_HEAD: usize = 256;
    /// Whether the thread that serves IOREQs polls (1) or must be rung (0).
    pub const LANES_IDLE: usize = 320;
    /// How many bulk slots the SoC has fetched, in the order in which they were announced.
    pub const BULK_FETCHED: usize = 384;
}
