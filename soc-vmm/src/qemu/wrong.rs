//! What is wrong with an option, told as far as it is known: which option, which key, why.

use std::fmt::{self, Display};

/// Why something that QEMU's command line or QMP says can't be meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The keys that lead to it, the outermost first.
    path: Vec<String>,
    why: String,
}

impl Wrong {
    /// A reason.
    pub fn new(why: impl Into<String>) -> Self {
        Self { path: Vec::new(), why: why.into() }
    }

    /// The same, of a key.
    #[must_use]
    pub fn at(mut self, key: impl Into<String>) -> Self {
        self.path.insert(0, key.into());
        self
    }
}

impl Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path.join(": "))?;
        }
        f.write_str(&self.why)
    }
}

impl std::error::Error for Wrong {}

impl serde::de::Error for Wrong {
    fn custom<T: Display>(why: T) -> Self {
        Self::new(why.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let known = if expected.is_empty() { "nothing".to_owned() } else { expected.join(", ") };
        Self::new(format!("there is no '{}' here; there is {known}", field.escape_default()))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(format!("'{}' is none of {}", variant.escape_default(), expected.join(", ")))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format!("it needs '{field}'"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::new(format!("'{field}' is there twice"))
    }
}
