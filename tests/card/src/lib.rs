//! The card in software: a vfio-user device.
