//! A string access (`ins`, `outs`): one request, many elements.

use ioreq_ring::Request;
use ioreq_ring::wire::STRING_PAGE;

/// The bytes of a string and how they divide.
pub(super) struct StringAccess {
    bytes: Vec<u8>,
    size: usize,
}

impl StringAccess {
    /// An empty string of the request's length. The request was checked: its element size divides its length.
    pub(super) fn new(request: &Request) -> Self {
        debug_assert!(request.string && usize::from(request.length) <= STRING_PAGE);
        Self { bytes: vec![0; request.length.into()], size: request.data as usize }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    pub(super) fn count(&self) -> usize {
        self.bytes.len() / self.size
    }

    /// Element `i` as an access of its own.
    pub(super) fn element(&self, request: &Request, i: usize) -> Request {
        let mut data = [0; 8];
        data[..self.size].copy_from_slice(&self.bytes[i * self.size..][..self.size]);
        Request { data: u64::from_le_bytes(data), length: self.size as u16, string: false, ..*request }
    }

    /// Sets element `i` to what was read.
    pub(super) fn set(&mut self, i: usize, value: u64) {
        self.bytes[i * self.size..][..self.size].copy_from_slice(&value.to_le_bytes()[..self.size]);
    }
}
