//! When the guest stops, and what is done if that moment doesn't come. Pure.

use crate::Parameters;
use crate::progress::expected;

/// Rounds in a row that have to fail before the guest is slowed.
const PATIENCE: u32 = 2;

/// What is known at the end of a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation {
    /// Bytes that are dirty.
    pub(super) pending: u64,
    /// Bytes of pages that this round sent.
    pub(super) sent: u64,
    /// Bytes that became dirty meanwhile.
    pub(super) dirtied: u64,
    /// Bytes a second; 0: unknown.
    pub(super) bandwidth: u64,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Another round.
    Round,
    /// Another round, the guest slowed so far.
    Throttle(u8),
    /// Another round, each vCPU limited to writing so many bytes a second.
    Limit(u64),
    /// The guest stops.
    Pause,
}

/// What has been tried.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Policy {
    /// Rounds in a row that were not worth it.
    in_vain: u32,
    throttle: u8,
    limit: Option<u64>,
}

impl Policy {
    pub(super) fn next(&mut self, now: &Situation, parameters: &Parameters) -> Step {
        let bandwidth = match parameters.switchover_bandwidth {
            0 => now.bandwidth,
            foretold => foretold,
        };
        let is_known = bandwidth > 0 || now.pending == 0;
        if is_known && expected(now.pending, bandwidth) <= parameters.downtime_limit {
            return Step::Pause;
        }
        // In u128: nobody has promised that bytes times 100 fit.
        let is_in_vain =
            u128::from(now.dirtied) * 100 > u128::from(now.sent) * u128::from(parameters.throttle_threshold);
        self.in_vain = if is_in_vain { self.in_vain + 1 } else { 0 };
        if self.in_vain < PATIENCE {
            return Step::Round;
        }
        if parameters.dirty_limit && self.limit != Some(parameters.write_limit) {
            (self.in_vain, self.limit) = (0, Some(parameters.write_limit));
            return Step::Limit(parameters.write_limit);
        }
        if !parameters.auto_converge {
            return Step::Round;
        }
        let next = match self.throttle {
            0 => parameters.throttle_initial,
            now => now.saturating_add(parameters.throttle_increment),
        };
        let next = next.min(parameters.throttle_max);
        if next <= self.throttle {
            return Step::Round;
        }
        // The next one gets its chance first.
        (self.in_vain, self.throttle) = (0, next);
        Step::Throttle(next)
    }
}

/// Whether pages that were dirty each time wait for the end: not if they are most of what there is, since then nothing but them can
/// bring the end nearer.
pub(super) fn puts_off(pending_pages: u64, hot_pages: u64) -> bool {
    hot_pages > 0 && hot_pages < pending_pages - hot_pages.min(pending_pages)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn situation() -> impl Strategy<Value = Situation> {
        (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>())
            .prop_map(|(pending, sent, dirtied, bandwidth)| Situation { pending, sent, dirtied, bandwidth })
    }

    fn parameters() -> impl Strategy<Value = Parameters> {
        (0..5_000u64, any::<bool>(), 1..=99u8, 1..=99u8, 0..=98u8, 1..=100u8, prop_oneof![Just(0), any::<u64>()])
            .prop_map(|(limit, auto_converge, initial, increment, more, threshold, switchover_bandwidth)| Parameters {
                downtime_limit: Duration::from_millis(limit),
                auto_converge,
                throttle_initial: initial,
                throttle_increment: increment,
                throttle_max: initial.saturating_add(more).min(99),
                throttle_threshold: threshold,
                switchover_bandwidth,
                ..Parameters::default()
            })
    }

    proptest! {
        #[test]
        fn it_pauses_exactly_when_the_limit_allows(now in situation(), parameters in parameters()) {
            let bandwidth = if parameters.switchover_bandwidth > 0 { parameters.switchover_bandwidth } else { now.bandwidth };
            let fits = now.pending == 0
                || bandwidth > 0 && now.pending as f64 / bandwidth as f64 <= parameters.downtime_limit.as_secs_f64() + 1e-9;
            if Policy::default().next(&now, &parameters) == Step::Pause {
                prop_assert!(fits);
            } else {
                prop_assert!(!fits || now.pending > 0);
            }
        }

        #[test]
        fn a_throttle_rises_to_its_maximum_and_no_further(
            rounds in prop::collection::vec(situation(), 1..60), parameters in parameters(),
        ) {
            let mut policy = Policy::default();
            let mut throttle = 0;
            for now in rounds {
                if let Step::Throttle(percent) = policy.next(&now, &parameters) {
                    prop_assert!(parameters.auto_converge && percent > throttle && percent <= parameters.throttle_max);
                    throttle = percent;
                }
            }
        }

        #[test]
        fn a_limit_is_set_once_and_anew_where_it_is_another(
            rounds in prop::collection::vec((situation(), 1..4u64), 1..60), parameters in parameters(),
        ) {
            let mut policy = Policy::default();
            let mut limit = None;
            for (now, write_limit) in rounds {
                let parameters = Parameters { dirty_limit: true, auto_converge: false, write_limit, ..parameters.clone() };
                match policy.next(&now, &parameters) {
                    Step::Limit(bytes) => {
                        prop_assert!(bytes == write_limit && limit != Some(bytes));
                        limit = Some(bytes);
                    }
                    step => prop_assert!(!matches!(step, Step::Throttle(_))),
                }
            }
        }

        /// A guest that writes faster than its pages move, whatever the numbers: with auto-converge it moves in a bounded number of rounds
        /// if it can at its slowest.
        #[test]
        fn it_converges(memory in 20..36u32, faster in 1..40u64, limit in 10..1000u64) {
            let (memory, bandwidth) = (1u64 << memory, 1u64 << 30);
            let parameters = Parameters {
                auto_converge: true, downtime_limit: Duration::from_millis(limit), ..Parameters::default()
            };
            let (mut policy, mut throttle, mut pending) = (Policy::default(), 0, memory);
            let mut rounds = 0;
            loop {
                let seconds = pending as f64 / bandwidth as f64;
                let rate = (bandwidth * faster) as f64 * f64::from(100 - throttle) / 100.0;
                let dirtied = memory.min((seconds * rate) as u64);
                let now = Situation { pending: dirtied, sent: pending, dirtied, bandwidth };
                match policy.next(&now, &parameters) {
                    Step::Pause => break,
                    Step::Throttle(percent) => throttle = percent,
                    Step::Round | Step::Limit(_) => {}
                }
                pending = dirtied;
                rounds += 1;
                prop_assert!(rounds < 200, "{pending} bytes left at {throttle} %");
            }
        }

        #[test]
        fn hot_pages_wait_only_beside_more_others(pending: u64, hot: u64) {
            let hot = hot.min(pending);
            prop_assert_eq!(puts_off(pending, hot), hot > 0 && pending - hot > hot);
        }
    }
}
