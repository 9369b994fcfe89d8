//! Descriptors and done records of the card's DMA queue, of any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pcie_function::card::queue::{Descriptor, Done, LENGTH_MAX, Operation};
use zerocopy::{FromBytes, IntoBytes};

const VECTORS: u32 = 128;

fuzz_target!(|data: &[u8]| {
    if let Ok((descriptor, _)) = Descriptor::read_from_prefix(data)
        && let Some(operation) = descriptor.operation(VECTORS)
    {
        match operation {
            Operation::ToHost(copy) | Operation::FromHost(copy) => {
                assert!((1..=LENGTH_MAX).contains(&copy.length), "{copy:?}");
                let last = u64::from(copy.length - 1);
                assert!(copy.host.checked_add(last).is_some() && copy.soc.checked_add(last).is_some(), "{copy:?}");
            }
            Operation::RaiseVector(vector) => assert!(vector < VECTORS),
        }
        let again = Descriptor::new(operation, descriptor.flags(), descriptor.generation(), descriptor.sequence());
        assert_eq!(again.as_bytes(), descriptor.as_bytes());
    }
    if let Ok((done, _)) = Done::read_from_prefix(data)
        && done.is_well_formed()
    {
        let again = Done::new(done.status(), done.transferred(), done.fault(), done.sequence());
        assert_eq!(again.as_bytes(), done.as_bytes());
    }
});
