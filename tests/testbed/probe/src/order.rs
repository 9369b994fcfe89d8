//! What the SoC's end asks of the host's: a line in the inbox each way through memory, its last word the number of the order.

/// Offset of the order in the inbox, behind the SoC's header line.
pub const ORDER: usize = 64;
/// Offset of the answer in card memory: answer, order's number.
pub const ANSWER: usize = 0x1_0000;
/// Bytes of the inbox and of the outbox.
pub const MAILBOX: usize = 0x1_0000;

/// RAM of the host: IOVA and bytes; ordinary pages, then huge ones.
pub const RAM: [(u64, usize); 2] = [(0, 1 << 20), (4 << 30, 4 << 20)];

/// Codes of orders: the first word of the line.
pub mod code {
    /// Answer with the argument.
    pub const ECHO: u64 = 1;
    /// Fill the outbox with the pattern of the argument.
    pub const FILL: u64 = 2;
    /// Answer with the checksum of RAM number argument.
    pub const SUM: u64 = 3;
    /// Take RAM number argument away from the function; answer when that is done.
    pub const UNMAP: u64 = 4;
    /// Map RAM number argument again.
    pub const MAP: u64 = 5;
    /// Answer 1 if vector number argument has been raised since it was last asked for, or is within a second; else 0.
    pub const VECTOR: u64 = 6;
    /// Answer with the number of vectors.
    pub const VECTORS: u64 = 7;
    /// Answer 0 if the function carries; else 1.
    pub const CHECK: u64 = 8;
    /// End.
    pub const END: u64 = 9;
}
