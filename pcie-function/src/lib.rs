//! A VM's PCIe function: BAR, mailbox, doorbells, vectors, DMA.

pub mod card;
