//! The value of `--iommu`.

use std::str::FromStr;

use super::values::{ValueError, wrong};

/// An IOMMU that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuModel {
    /// Intel's VT-d.
    Intel,
}

impl FromStr for IommuModel {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        match s {
            "intel" => Ok(Self::Intel),
            _ => wrong(format!("'{s}' is no IOMMU; there is intel")),
        }
    }
}
