//! What holds of the small devices whatever a guest and their peers do.

use proptest::collection::vec;
use proptest::prelude::*;

use super::program::{Kind, run};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_chain_does_harm(
        kind in prop_oneof![Just(Kind::Entropy), Just(Kind::Console), Just(Kind::Vsock), Just(Kind::Balloon)],
        program in vec(any::<u8>(), 0..800),
    ) {
        run(kind, &program);
    }
}
