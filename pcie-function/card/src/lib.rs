//! SoC side of an emulated card: a vfio-user client.
