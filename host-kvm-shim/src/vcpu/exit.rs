//! What an exit asks of the SoC, and what its answer means to KVM: pure, so that it can be tested without KVM.

use ioreq_ring::wire::{STRING_PAGE, exit_reason};
use ioreq_ring::{Completion, Direction, Kind, Request, Status};

use crate::kvm::RawExit;

/// What becomes of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing: enter the guest again.
    Enter,
    /// Room in the dirty ring, then enter the guest again.
    MakeRoom,
    /// An access: the SoC answers, then the guest goes on.
    Ask(Request),
    /// The vCPU can't go on: the SoC is told, then the vCPU stays out of the guest.
    Report(Request),
}

/// What the SoC is asked because of an exit at `host_tsc`.
pub(crate) fn action(exit: &RawExit, host_tsc: u64) -> Action {
    use Action::{Ask, Enter, MakeRoom};
    match *exit {
        RawExit::Io { direction, port, size, count: 1, first } if matches!(size, 1 | 2 | 4) => {
            Ask(Request::access(Kind::PIO, direction, port.into(), first.into(), size, host_tsc))
        }
        RawExit::Io { direction, port, size, count, .. } => {
            let bytes = u64::from(size) * u64::from(count);
            if !matches!(size, 1 | 2 | 4) || bytes == 0 || bytes > STRING_PAGE as u64 {
                return report(exit_reason::UNKNOWN, [kvm_bindings::KVM_EXIT_IO.into(), bytes, 0, 0], host_tsc);
            }
            Ask(Request {
                kind: Kind::PIO,
                direction,
                address: port.into(),
                data: size.into(),
                host_tsc,
                length: bytes as u16,
                string: true,
                words: None,
            })
        }
        RawExit::Mmio { direction, address, len, data } => match u8::try_from(len) {
            Ok(len @ 1..=8) => {
                let data = if len == 8 { data } else { data & ((1 << (len * 8)) - 1) };
                Ask(Request::access(Kind::MMIO, direction, address, data, len, host_tsc))
            }
            _ => report(exit_reason::UNKNOWN, [kvm_bindings::KVM_EXIT_MMIO.into(), len.into(), 0, 0], host_tsc),
        },
        RawExit::Msr { direction, index, data } => {
            Ask(Request::access(Kind::MSR, direction, index.into(), data, 8, host_tsc))
        }
        RawExit::Hypercall { number, args } => {
            let call = Request::access(Kind::HYPERCALL, Direction::Read, number, 0, 8, host_tsc);
            Ask(Request { words: Some(args), ..call })
        }
        RawExit::HvHypercall { input, params: [a, b] } => {
            let call = Request::access(Kind::HV_HYPERCALL, Direction::Read, input, 0, 8, host_tsc);
            Ask(Request { words: Some([a, b, 0, 0]), ..call })
        }
        RawExit::HvSynic { msr, control, event_page, message_page } => {
            let change = Request::access(Kind::HV_SYNIC, Direction::Write, msr.into(), 0, 0, host_tsc);
            Ask(Request { words: Some([control, event_page, message_page, 0]), ..change })
        }
        RawExit::IoapicEoi { vector } => {
            Ask(Request::access(Kind::EOI, Direction::Write, vector.into(), 0, 1, host_tsc))
        }
        RawExit::Interrupted => Enter,
        RawExit::RingFull => MakeRoom,
        RawExit::Halt => report(exit_reason::HALT, [0; 4], host_tsc),
        RawExit::Shutdown => report(exit_reason::SHUTDOWN, [0; 4], host_tsc),
        RawExit::InternalError { suberror, data: [a, b, c] } => {
            report(exit_reason::INTERNAL_ERROR, [suberror.into(), a, b, c], host_tsc)
        }
        RawExit::FailEntry { reason, cpu } => report(exit_reason::FAIL_ENTRY, [reason, cpu.into(), 0, 0], host_tsc),
        RawExit::SystemEvent { kind, flags } => report(exit_reason::SYSTEM_EVENT, [kind.into(), flags, 0, 0], host_tsc),
        RawExit::Other { reason } => report(exit_reason::UNKNOWN, [reason.into(), 0, 0, 0], host_tsc),
    }
}

/// A report that KVM_RUN failed.
pub(crate) fn run_failed(errno: i32, host_tsc: u64) -> Request {
    report_request(exit_reason::RUN_FAILED, [errno as u64, 0, 0, 0], host_tsc)
}

fn report(reason: u64, words: [u64; 4], host_tsc: u64) -> Action {
    Action::Report(report_request(reason, words, host_tsc))
}

fn report_request(reason: u64, words: [u64; 4], host_tsc: u64) -> Request {
    let request = Request::access(Kind::EXIT_REPORT, Direction::Write, reason, 0, 0, host_tsc);
    Request { words: Some(words), ..request }
}

/// The data that a read gives the guest: all ones unless a device answered.
pub(crate) fn read_data(completion: &Completion) -> u64 {
    if completion.status == Status::OK { completion.data } else { u64::MAX }
}

/// The result value of a Hyper-V hypercall: HV_STATUS_INVALID_HYPERCALL_CODE unless the SoC served it.
pub(crate) fn hv_result(completion: &Completion) -> u64 {
    if completion.status == Status::OK { completion.data } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(exit: RawExit) -> Request {
        match action(&exit, 7) {
            Action::Ask(request) => request,
            other => panic!("{other:?}"),
        }
    }

    fn reported(exit: RawExit) -> (u64, [u64; 4]) {
        match action(&exit, 7) {
            Action::Report(Request { kind: Kind::EXIT_REPORT, address, words: Some(words), length: 0, .. }) => {
                (address, words)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn single_port_accesses_carry_their_data_and_strings_their_element_size() {
        for size in [1, 2, 4] {
            let out = RawExit::Io { direction: Direction::Write, port: 0x3f8, size, count: 1, first: 0x61 };
            let expected = Request::access(Kind::PIO, Direction::Write, 0x3f8, 0x61, size, 7);
            assert_eq!(asked(out), expected);
            let string = RawExit::Io { direction: Direction::Read, port: 0x1f0, size, count: 256, first: 0 };
            let request = asked(string);
            assert!(request.string && request.direction == Direction::Read);
            assert_eq!((request.data, request.length), (u64::from(size), 256 * u16::from(size)));
        }
    }

    #[test]
    fn a_port_access_that_no_page_holds_is_a_report() {
        for (size, count) in [(4, 1025), (2, u32::MAX), (3, 1), (0, 0), (8, 1), (1, 0)] {
            let exit = RawExit::Io { direction: Direction::Read, port: 1, size, count, first: 0 };
            assert_eq!(reported(exit).0, exit_reason::UNKNOWN, "{size} × {count}");
        }
        let whole = RawExit::Io { direction: Direction::Read, port: 1, size: 4, count: 1024, first: 0 };
        assert_eq!(asked(whole).length, 4096);
    }

    #[test]
    fn memory_accesses_of_every_length_carry_no_byte_beyond_it() {
        for len in 1..=8u8 {
            let exit = RawExit::Mmio { direction: Direction::Write, address: 0xfee0, len: len.into(), data: u64::MAX };
            let request = asked(exit);
            assert_eq!(request.length, len.into());
            assert_eq!(request.data.count_ones(), u32::from(len) * 8);
        }
        for len in [0, 9, u32::MAX] {
            let exit = RawExit::Mmio { direction: Direction::Read, address: 0, len, data: 0 };
            assert_eq!(reported(exit), (exit_reason::UNKNOWN, [6, len.into(), 0, 0]));
        }
    }

    #[test]
    fn hyper_v_exits_carry_all_that_kvm_says() {
        let call = asked(RawExit::HvHypercall { input: 1 << 16 | 0x5d, params: [3, 4] });
        assert_eq!((call.kind, call.address, call.words), (Kind::HV_HYPERCALL, 0x1_005d, Some([3, 4, 0, 0])));
        let change = RawExit::HvSynic { msr: 0x4000_0083, control: 1, event_page: 2, message_page: 3 };
        let change = asked(change);
        assert_eq!((change.kind, change.address, change.words), (Kind::HV_SYNIC, 0x4000_0083, Some([1, 2, 3, 0])));
    }

    #[test]
    fn whatever_ends_a_vcpu_is_a_report_with_its_details() {
        assert_eq!(reported(RawExit::Shutdown).0, exit_reason::SHUTDOWN);
        assert_eq!(reported(RawExit::Halt).0, exit_reason::HALT);
        let error = RawExit::InternalError { suberror: 1, data: [2, 3, 4] };
        assert_eq!(reported(error), (exit_reason::INTERNAL_ERROR, [1, 2, 3, 4]));
        assert_eq!(reported(RawExit::FailEntry { reason: 5, cpu: 6 }), (exit_reason::FAIL_ENTRY, [5, 6, 0, 0]));
        assert_eq!(reported(RawExit::SystemEvent { kind: 2, flags: 9 }), (exit_reason::SYSTEM_EVENT, [2, 9, 0, 0]));
        assert_eq!(reported(RawExit::Other { reason: 99 }), (exit_reason::UNKNOWN, [99, 0, 0, 0]));
        assert_eq!(action(&RawExit::Interrupted, 7), Action::Enter);
        assert_eq!(action(&RawExit::RingFull, 7), Action::MakeRoom);
    }

    #[test]
    fn only_a_device_that_answered_gives_data() {
        let completion = Completion::ok(0x1234);
        assert_eq!(read_data(&completion), 0x1234);
        assert_eq!(hv_result(&completion), 0x1234);
        for status in [Status::UNCLAIMED, Status::DEVICE_FAILED, Status::UNKNOWN_KIND, Status(200)] {
            assert_eq!(read_data(&Completion { status, ..completion }), u64::MAX);
            assert_eq!(hv_result(&Completion { status, ..completion }), 2);
        }
    }
}
