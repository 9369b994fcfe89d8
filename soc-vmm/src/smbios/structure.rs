//! One structure (DSP0134 §6.1): a header, fields, strings.

/// A structure that is being filled.
pub(super) struct Structure {
    fields: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    pub(super) fn new(kind: u8, handle: u16) -> Self {
        let mut fields = vec![kind, 0];
        fields.extend(handle.to_le_bytes());
        Self { fields, strings: Vec::new(), count: 0 }
    }

    pub(super) fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(super) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.fields.extend_from_slice(bytes);
        self
    }

    /// A string's number; an empty one is none. What could end it early, or is no text, is left out.
    pub(super) fn string(self, text: &str) -> Self {
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        if text.trim().is_empty() {
            return self.u8(0);
        }
        let mut this = self;
        this.count += 1;
        this.strings.extend_from_slice(text.trim().as_bytes());
        this.strings.push(0);
        let number = this.count;
        this.u8(number)
    }

    /// The structure's bytes.
    pub(super) fn end(mut self) -> Vec<u8> {
        self.fields[1] = self.fields.len() as u8;
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        self.strings.push(0);
        self.fields.append(&mut self.strings);
        self.fields
    }
}
