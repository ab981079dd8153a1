use super::*;
use proptest::prelude::*;

const HZ: u64 = 400_000_000;

fn apic() -> LocalApic {
    LocalApic::new(3, true, Clock::new(HZ))
}

fn enabled() -> LocalApic {
    let mut apic = apic();
    apic.mmio_write(Ticks(0), 0xf0, Width::Dword, 0x1ff);
    apic
}

fn x2apic() -> LocalApic {
    let mut apic = enabled();
    let base = apic.base_msr();
    apic.set_base_msr(Ticks(0), base | 1 << 10).unwrap();
    apic
}

fn fixed(vector: u8, trigger: Trigger) -> Message {
    Message {
        mode: DeliveryMode::Fixed,
        destination: Destination::All,
        vector,
        trigger,
        assert: true,
    }
}

#[test]
fn identity_in_both_modes() {
    let mut apic = apic();
    assert_eq!(apic.base_msr(), 0xfee0_0900);
    assert_eq!(apic.mmio_read(Ticks(0), 0x20, Width::Dword), 0x0300_0000);
    assert_eq!(apic.mmio_read(Ticks(0), 0x30, Width::Dword), 0x0005_0014);
    assert_eq!(
        apic.msr_read(Ticks(0), 0x802),
        Err(Fault),
        "not in x2APIC mode"
    );
    let mut apic = x2apic();
    assert_eq!(apic.msr_read(Ticks(0), 0x802), Ok(3));
    assert_eq!(
        apic.msr_read(Ticks(0), 0x80d),
        Ok(8),
        "logical: cluster 0, bit 3"
    );
}

#[test]
fn transitions_of_the_base_register() {
    let mut apic = apic();
    let base = apic.base_msr();
    assert_eq!(
        apic.set_base_msr(Ticks(0), base & !(1 << 11) | 1 << 10),
        Err(Fault)
    );
    assert_eq!(
        apic.set_base_msr(Ticks(0), base | 1),
        Err(Fault),
        "reserved"
    );
    assert!(apic.set_base_msr(Ticks(0), base | 1 << 10).is_ok());
    assert_eq!(
        apic.set_base_msr(Ticks(0), base),
        Err(Fault),
        "x2APIC to xAPIC"
    );
    assert!(apic.set_base_msr(Ticks(0), base & !(1 << 11)).is_ok());
    assert_eq!(apic.set_base_msr(Ticks(0), base | 1 << 10), Err(Fault));
    assert!(
        apic.lint0_takes_extint(),
        "an APIC that is off is transparent"
    );
    assert!(apic.set_base_msr(Ticks(0), base).is_ok());
    assert_eq!(apic.mode(), Mode::XApic);
}

#[test]
fn a_higher_class_interrupts_a_lower_one() {
    let mut apic = enabled();
    apic.accept(fixed(0x41, Trigger::Edge));
    assert_eq!(apic.acknowledge(), Some(0x41));
    apic.accept(fixed(0x4f, Trigger::Edge));
    assert_eq!(apic.pending(), None, "same class");
    apic.accept(fixed(0x51, Trigger::Level));
    assert_eq!(apic.acknowledge(), Some(0x51));
    assert_eq!(apic.eoi(), Some(Action::BroadcastEoi(0x51)));
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.acknowledge(), Some(0x4f));
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let mut apic = enabled();
    apic.set_cr8(5);
    assert_eq!(apic.mmio_read(Ticks(0), 0x80, Width::Dword), 0x50);
    apic.accept(fixed(0x5f, Trigger::Edge));
    assert_eq!(apic.pending(), None);
    apic.set_cr8(4);
    assert_eq!(apic.pending(), Some(0x5f));
}

#[test]
fn the_command_register_becomes_a_message() {
    let mut apic = enabled();
    apic.mmio_write(Ticks(0), 0x310, Width::Dword, 7 << 24);
    let action = apic.mmio_write(Ticks(0), 0x300, Width::Dword, 0x4031);
    let Some(Action::Send(message)) = action else {
        panic!("{action:?}")
    };
    assert_eq!(
        (message.vector, message.destination),
        (0x31, Destination::Physical(7))
    );
    // All but itself, NMI.
    let action = apic.mmio_write(Ticks(0), 0x300, Width::Dword, 0xc_4400);
    let Some(Action::Send(message)) = action else {
        panic!("{action:?}")
    };
    assert_eq!(
        (message.mode, message.destination),
        (DeliveryMode::Nmi, Destination::Others)
    );
}

#[test]
fn a_self_ipi_needs_no_message() {
    let mut apic = x2apic();
    assert_eq!(apic.msr_write(Ticks(0), 0x83f, 0x33), Ok(None));
    assert_eq!(apic.acknowledge(), Some(0x33));
    assert_eq!(apic.msr_write(Ticks(0), 0x80b, 0), Ok(None));
    assert_eq!(apic.msr_write(Ticks(0), 0x830, 0x4_4044), Ok(None));
    assert_eq!(apic.acknowledge(), Some(0x44));
}

#[test]
fn x2apic_faults_on_reserved_bits() {
    let mut apic = x2apic();
    for (msr, value) in [
        (0x80b, 1),
        (0x808, 0x100),
        (0x80f, 1 << 20),
        (0x828, 1),
        (0x830, 1 << 20),
        (0x83e, 4),
        (0x80e, 0),
        (0x831, 0),
        (0x802, 0),
    ] {
        assert_eq!(apic.msr_write(Ticks(0), msr, value), Err(Fault), "{msr:#x}");
    }
    assert_eq!(
        apic.msr_read(Ticks(0), 0x80b),
        Err(Fault),
        "EOI is write-only"
    );
    assert_eq!(apic.msr_read(Ticks(0), 0x80e), Err(Fault), "no DFR");
}

#[test]
fn illegal_vectors_are_errors() {
    let mut apic = enabled();
    apic.mmio_write(Ticks(0), 0x370, Width::Dword, 0xfe);
    apic.mmio_write(Ticks(0), 0x300, Width::Dword, 0x4_400f);
    assert_eq!(
        apic.mmio_read(Ticks(0), 0x280, Width::Dword),
        0,
        "until it is written"
    );
    apic.mmio_write(Ticks(0), 0x280, Width::Dword, 0);
    assert_eq!(apic.mmio_read(Ticks(0), 0x280, Width::Dword), 0x20);
    assert_eq!(apic.acknowledge(), Some(0xfe));
}

#[test]
fn one_shot_counts_down_and_expires_once() {
    let mut apic = enabled();
    apic.mmio_write(Ticks(0), 0x320, Width::Dword, 0xec);
    apic.mmio_write(Ticks(0), 0x3e0, Width::Dword, 0xb);
    // A millisecond, which is 400,000 ticks.
    apic.mmio_write(Ticks(0), 0x380, Width::Dword, 1_000_000);
    assert_eq!(apic.deadline(), Some(Ticks(400_000)));
    assert_eq!(apic.mmio_read(Ticks(100_000), 0x390, Width::Dword), 750_000);
    apic.advance(Ticks(399_999));
    assert_eq!(apic.pending(), None);
    apic.advance(Ticks(400_000));
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.deadline(), None);
    assert_eq!(apic.mmio_read(Ticks(500_000), 0x390, Width::Dword), 0);
}

#[test]
fn periods_that_were_missed_are_one_interrupt() {
    let mut apic = enabled();
    apic.mmio_write(Ticks(0), 0x320, Width::Dword, 0x2_00ec);
    apic.mmio_write(Ticks(0), 0x3e0, Width::Dword, 0xb);
    apic.mmio_write(Ticks(0), 0x380, Width::Dword, 1_000_000);
    apic.advance(Ticks(400_000 * 1000 + 5));
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.deadline(), Some(Ticks(400_000 * 1001)));
}

#[test]
fn a_tsc_deadline() {
    let mut apic = enabled();
    apic.set_tsc_deadline(Ticks(0), 1000);
    assert_eq!(apic.deadline(), None, "another mode");
    apic.mmio_write(Ticks(0), 0x320, Width::Dword, 0x4_00ec);
    apic.set_tsc_deadline(Ticks(0), 1000);
    assert_eq!(apic.tsc_deadline(Ticks(5)), 1000);
    apic.advance(Ticks(1000));
    assert_eq!(apic.pending(), Some(0xec));
    assert_eq!(apic.tsc_deadline(Ticks(1001)), 0);
}

#[test]
fn logical_destinations() {
    let mut apic = enabled();
    apic.mmio_write(Ticks(0), 0xd0, Width::Dword, 0x0200_0000);
    assert!(apic.is_destination(Destination::Logical(0x03), false));
    assert!(!apic.is_destination(Destination::Logical(0x04), false));
    apic.mmio_write(Ticks(0), 0xe0, Width::Dword, 0x0fff_ffff);
    apic.mmio_write(Ticks(0), 0xd0, Width::Dword, 0x1200_0000);
    assert!(apic.is_destination(Destination::Logical(0x12), false));
    assert!(apic.is_destination(Destination::Logical(0xf2), false));
    assert!(!apic.is_destination(Destination::Logical(0x22), false));
}

proptest! {
    #[test]
    fn what_is_pending_is_above_the_processor_priority(vectors: Vec<u8>, tpr: u8, taken in 0..8usize) {
        let mut apic = enabled();
        for vector in &vectors {
            apic.accept(fixed(*vector, Trigger::Edge));
        }
        apic.mmio_write(Ticks(0), 0x80, Width::Dword, tpr.into());
        let mut last = None;
        for _ in 0..taken {
            let ppr = apic.mmio_read(Ticks(0), 0xa0, Width::Dword);
            let Some(vector) = apic.acknowledge() else { break };
            prop_assert!(u64::from(vector) >> 4 > ppr >> 4);
            prop_assert!(last.is_none_or(|last: u8| vector >> 4 > last >> 4));
            last = Some(vector);
        }
    }

    #[test]
    fn no_access_panics_and_no_deadline_is_in_the_past(
        accesses: Vec<(u8, u16, u32, u16)>, x2: bool,
    ) {
        let mut apic = if x2 { x2apic() } else { enabled() };
        let mut now = Ticks(0);
        for (kind, offset, value, step) in accesses {
            now.0 += u64::from(step);
            match kind % 5 {
                0 => { apic.mmio_write(now, offset.into(), Width::Dword, value.into()); }
                1 => { apic.mmio_read(now, offset.into(), Width::Byte); }
                2 => { let _ = apic.msr_write(now, 0x800 + u32::from(offset & 0xff), value.into()); }
                3 => { let _ = apic.msr_read(now, 0x800 + u32::from(offset & 0xff)); }
                _ => apic.set_tsc_deadline(now, value.into()),
            }
            apic.advance(now);
            prop_assert!(apic.deadline().is_none_or(|deadline| deadline > now));
            apic.acknowledge();
        }
    }
}
