use super::*;
use proptest::prelude::*;

const INTERRUPT: InterruptionInfo = InterruptionInfo::interrupt(0x30);

fn pending(interrupted: bool, exception: bool, nmi: bool) -> Pending {
    Pending {
        interrupted: interrupted.then_some((INTERRUPT, 0, 0)),
        exception: exception.then_some(Exception::InvalidOpcode),
        nmis: nmi.into(),
        extint: false,
    }
}

#[test]
fn the_order_is_interrupted_fault_nmi_interrupt() {
    let choose = |pending: Pending| pending.choose(true, 0, RFLAGS_IF);
    assert_eq!(choose(pending(true, true, true)), Choice::Again);
    assert_eq!(choose(pending(false, true, true)), Choice::Exception);
    assert_eq!(choose(pending(false, false, true)), Choice::Nmi);
    assert_eq!(choose(pending(false, false, false)), Choice::Interrupt);
    assert_eq!(
        Pending::default().choose(false, 0, RFLAGS_IF),
        Choice::Nothing
    );
}

#[test]
fn a_blocked_nmi_lets_an_interrupt_pass() {
    let nmi = pending(false, false, true);
    assert_eq!(
        nmi.choose(true, BLOCKED_BY_NMI, RFLAGS_IF),
        Choice::Interrupt
    );
    assert_eq!(nmi.choose(true, BLOCKED_BY_NMI, 0), Choice::Nothing);
    assert_eq!(nmi.choose(true, 0, 0), Choice::Nmi);
}

/// Two NMIs that come at once are both handled; while one is, another waits, and no more.
#[test]
fn as_many_nmis_wait_as_a_cpu_would_remember() {
    let none = Pending::default();
    assert_eq!(none.most_nmis(0), 2);
    assert_eq!(none.most_nmis(BLOCKED_BY_STI), 2);
    assert_eq!(none.most_nmis(BLOCKED_BY_NMI), 1);
    let delivered = Pending {
        interrupted: Some((InterruptionInfo::NMI, 0, 0)),
        ..Pending::default()
    };
    assert_eq!(delivered.most_nmis(0), 1);
    assert_eq!(pending(true, false, false).most_nmis(0), 2);
}

#[test]
fn real_mode_has_no_error_codes() {
    let fault = InterruptionInfo::exception(13, true);
    assert!(info_again(fault, true).has_error_code());
    assert_eq!(
        info_again(fault, false).as_entry(),
        InterruptionInfo::exception(13, false).as_entry()
    );
    assert_eq!(
        info_again(INTERRUPT, false).as_entry(),
        INTERRUPT.as_entry()
    );
}

proptest! {
    /// What VM entry checks of an injected event (SDM 3, "Checks on Guest Non-Register State").
    #[test]
    fn nothing_is_injected_that_an_entry_refuses(
        interrupted: bool, exception: bool, nmi: bool, interrupt: bool,
        interruptibility in 0u32..16, rflags: u64,
    ) {
        let shadow = interruptibility & (BLOCKED_BY_STI | BLOCKED_BY_MOV_SS) != 0;
        match pending(interrupted, exception, nmi).choose(interrupt, interruptibility, rflags) {
            Choice::Interrupt => prop_assert!(interrupt && !shadow && rflags & RFLAGS_IF != 0),
            Choice::Nmi => prop_assert!(nmi && !shadow && interruptibility & BLOCKED_BY_NMI == 0),
            Choice::Again => prop_assert!(interrupted),
            Choice::Exception => prop_assert!(exception && !interrupted),
            Choice::Nothing => prop_assert!(!interrupted && !exception),
        }
    }
}
