//! Guest payloads, assembled.
