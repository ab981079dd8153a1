//! MMIO and MSR accesses, IA32_APIC_BASE, the ICR.

use super::*;
use DeliveryMode::{Fixed, Init, LowestPriority, Nmi, Smi, StartUp};

#[test]
fn registers_after_power_on() {
    let mut apic = disabled();
    assert_eq!(apic.base_msr(), 0xfee0_0800);
    assert_eq!(apic.mode(), Mode::XApic);
    for (offset, value) in [
        (0x20, 0x0300_0000),
        (0x30, 0x0005_0015),
        (0x80, 0),
        (0xa0, 0),
        (0xd0, 0),
        (0xe0, 0xffff_ffff),
        (0xf0, 0xff),
        (0x320, 0x1_0000),
        (0x330, 0x1_0000),
        (0x340, 0x1_0000),
        (0x350, 0x1_0000),
        (0x360, 0x1_0000),
        (0x370, 0x1_0000),
        (0x380, 0),
        (0x390, 0),
        (0x3e0, 0),
    ] {
        assert_eq!(get(&mut apic, offset), value, "{offset:#x}");
    }
    assert_eq!(errors(&mut apic), 0);
}

#[test]
fn the_bootstrap_processor_is_in_virtual_wire_mode() {
    let mut apic = LocalApic::new(0, true, Clock::new(HZ));
    assert_eq!(apic.base_msr(), 0xfee0_0900);
    assert_eq!(get(&mut apic, 0xf0), 0x1ff);
    assert_eq!(get(&mut apic, 0x350), 0x700);
    assert_eq!(get(&mut apic, 0x360), 0x400);
}

#[test]
fn without_x2apic_mode_the_identifier_can_be_changed() {
    let mut apic = LocalApic::new(3, false, Clock::new(HZ)).with_config(Config {
        x2apic: false,
        ..Config::default()
    });
    set(&mut apic, 0xf0, 0x1ff);
    let base = apic.base_msr();
    assert_eq!(apic.set_base_msr(NOW, base | 1 << 10), Err(Fault));
    set(&mut apic, 0x20, 0x0712_3456);
    assert_eq!(get(&mut apic, 0x20), 0x0700_0000);
    assert!(apic.is_destination(Destination::Physical(7), false));
    assert!(!apic.is_destination(Destination::Physical(3), false));
    // Another may have that identifier too: the command goes to whoever has it.
    assert!(!apic.xapic_self_ipi(0x41));
    set(&mut apic, 0x310, 0x0700_0000);
    let sent = apic.mmio_write(NOW, 0x300, Width::Dword, 0x41);
    assert!(matches!(sent, Some(Action::Send(_))));
    // INIT leaves it, until the APIC is off.
    apic.accept(message(DeliveryMode::Init, 7, Trigger::Edge));
    assert_eq!(get(&mut apic, 0x20), 0x0700_0000);
    apic.set_base_msr(NOW, base & !(1 << 11)).unwrap();
    apic.set_base_msr(NOW, base).unwrap();
    assert_eq!(get(&mut apic, 0x20), 0x0300_0000);
    // A CPU of today keeps it.
    let mut apic = xapic();
    set(&mut apic, 0x20, 0x0700_0000);
    assert_eq!(get(&mut apic, 0x20), 0x0300_0000);
}

#[test]
fn what_software_can_write() {
    let mut apic = xapic();
    for (offset, value) in [
        (0x80, 0xff),
        (0xd0, 0xff00_0000),
        (0xe0, 0xffff_ffff),
        (0x310, 0xff00_0000),
        (0x320, 0x7_00ff),
        (0x330, 0x1_07ff),
        (0x340, 0x1_07ff),
        (0x350, 0x1_a7ff),
        (0x360, 0x1_a7ff),
        (0x370, 0x1_00ff),
        (0x3e0, 0xb),
        (0xf0, 0x1ff),
    ] {
        set(&mut apic, offset, 0xffff_ffff);
        assert_eq!(get(&mut apic, offset), value, "{offset:#x}");
    }
    for offset in [0x20, 0x30, 0xa0, 0xc0, 0x100, 0x180, 0x200, 0x390] {
        let before = get(&mut apic, offset);
        set(&mut apic, offset, 0xffff_ffff);
        assert_eq!(get(&mut apic, offset), before, "{offset:#x}");
    }
    assert_eq!(errors(&mut apic), 0);
    set(&mut apic, 0xe0, 0);
    assert_eq!(get(&mut apic, 0xe0), 0x0fff_ffff);
}

#[test]
fn a_register_that_does_not_exist_is_an_error() {
    for offset in [0x00, 0x10, 0x40, 0x70, 0x290, 0x2f0, 0x3a0, 0x3d0, 0x3f0] {
        let mut apic = xapic();
        assert_eq!(get(&mut apic, offset), 0);
        assert_eq!(errors(&mut apic), 1 << 7, "read {offset:#x}");
        set(&mut apic, offset, 0);
        assert_eq!(errors(&mut apic), 1 << 7, "write {offset:#x}");
    }
    let mut apic = xapic();
    assert_eq!(get(&mut apic, 0xb0), 0, "EOI is write-only");
    assert_eq!(get(&mut apic, 0x400), 0, "beyond the registers");
    set(&mut apic, 0x400, 0);
    assert_eq!(errors(&mut apic), 0);
}

#[test]
fn accesses_that_are_not_aligned_or_not_32_bits_wide() {
    let mut apic = xapic();
    assert_eq!(apic.mmio_read(NOW, 0x32, Width::Byte), 0x05);
    assert_eq!(apic.mmio_read(NOW, 0x30, Width::Word), 0x15);
    assert_eq!(apic.mmio_read(NOW, 0x31, Width::Dword), 0x500);
    assert_eq!(apic.mmio_read(NOW, 0x30, Width::Qword), 0x0005_0015);
    for offset in [0x34, 0x38, 0x3c] {
        assert_eq!(apic.mmio_read(NOW, offset, Width::Dword), 0);
    }
    apic.mmio_write(NOW, 0x80, Width::Byte, 0x20);
    apic.mmio_write(NOW, 0x80, Width::Word, 0x20);
    apic.mmio_write(NOW, 0x80, Width::Qword, 0x20);
    apic.mmio_write(NOW, 0x84, Width::Dword, 0x20);
    assert_eq!(get(&mut apic, 0x80), 0);
    assert_eq!(errors(&mut apic), 0);
}

#[test]
fn there_is_no_page_outside_xapic_mode() {
    let mut apic = x2apic();
    assert_eq!(get(&mut apic, 0x30), 0xffff_ffff);
    assert_eq!(set(&mut apic, 0x300, 0x4_4041), None);
    assert_eq!(apic.pending(), None);
}

#[test]
fn transitions_of_the_mode() {
    const DISABLED: u64 = 0xfee0_0000;
    const XAPIC: u64 = 0xfee0_0800;
    const X2APIC: u64 = 0xfee0_0c00;
    const INVALID: u64 = 0xfee0_0400;
    let reach = |state: u64| {
        let mut apic = xapic();
        if state != XAPIC {
            apic.set_base_msr(NOW, state).unwrap();
        }
        apic
    };
    for (from, to, allowed) in [
        (DISABLED, DISABLED, true),
        (DISABLED, XAPIC, true),
        (DISABLED, X2APIC, false),
        (DISABLED, INVALID, false),
        (XAPIC, DISABLED, true),
        (XAPIC, XAPIC, true),
        (XAPIC, X2APIC, true),
        (XAPIC, INVALID, false),
        (X2APIC, DISABLED, true),
        (X2APIC, XAPIC, false),
        (X2APIC, X2APIC, true),
        (X2APIC, INVALID, false),
    ] {
        let mut apic = reach(from);
        let result = apic.set_base_msr(NOW, to);
        assert_eq!(result.is_ok(), allowed, "{from:#x} to {to:#x}");
        assert_eq!(apic.base_msr(), if allowed { to } else { from });
    }
}

#[test]
fn the_registers_can_be_moved_within_physical_memory() {
    let mut apic = disabled().with_config(Config {
        physical_address_bits: 39,
        ..Config::default()
    });
    for reserved in [1 << 0, 1 << 7, 1 << 9, 1 << 39, 1 << 63] {
        let value = 0xfee0_0800 | reserved;
        assert_eq!(apic.set_base_msr(NOW, value), Err(Fault), "{value:#x}");
    }
    assert_eq!(apic.address(), 0xfee0_0000);
    assert_eq!(apic.set_base_msr(NOW, 0x7f_ffff_f900), Ok(()));
    assert_eq!(apic.address(), 0x7f_ffff_f000);
    assert_eq!(apic.base_msr(), 0x7f_ffff_f900);
}

#[test]
fn entering_x2apic_mode_keeps_the_state_and_leaving_it_does_not() {
    let mut apic = xapic();
    apic.accept(fixed(0x41, Trigger::Edge));
    apic.set_cr8(1);
    set(&mut apic, 0x310, 0x0500_0000);
    set(&mut apic, 0x370, 0xfe);
    apic.set_base_msr(NOW, 0xfee0_0c00).unwrap();
    assert_eq!(apic.msr_read(NOW, 0x802), Ok(3));
    assert_eq!(apic.msr_read(NOW, 0x80d), Ok(1 << 3));
    assert_eq!(apic.msr_read(NOW, 0x80f), Ok(0x1ff));
    assert_eq!(apic.msr_read(NOW, 0x808), Ok(0x10));
    assert_eq!(apic.msr_read(NOW, 0x837), Ok(0xfe));
    assert_eq!(apic.msr_read(NOW, 0x830), Ok(0));
    assert_eq!(apic.pending(), Some(0x41));
    apic.set_base_msr(NOW, 0xfee0_0000).unwrap();
    apic.set_base_msr(NOW, 0xfee0_0800).unwrap();
    assert_eq!(get(&mut apic, 0x20), 0x0300_0000);
    assert_eq!(get(&mut apic, 0xe0), 0xffff_ffff);
    assert_eq!(get(&mut apic, 0xf0), 0xff);
    assert_eq!(get(&mut apic, 0x370), 0x1_0000);
    assert_eq!(get(&mut apic, 0x220), 0);
}

/// Which MSRs can be read and written, and the bits of each that are defined
/// (SDM 3, table 12-6 and the figures of the registers).
const X2APIC_MSRS: [(u32, bool, Option<u64>); 23] = [
    (0x802, true, None),
    (0x803, true, None),
    (0x808, true, Some(0xff)),
    (0x80a, true, None),
    (0x80b, false, Some(0)),
    (0x80d, true, None),
    (0x80f, true, Some(0x1ff)),
    (0x810, true, None),
    (0x817, true, None),
    (0x818, true, None),
    (0x820, true, None),
    (0x828, true, Some(0)),
    (0x830, true, Some(0xffff_ffff_000c_dfff)),
    (0x832, true, Some(0x7_10ff)),
    (0x833, true, Some(0x1_17ff)),
    (0x834, true, Some(0x1_17ff)),
    (0x835, true, Some(0x1_f7ff)),
    (0x836, true, Some(0x1_f7ff)),
    (0x837, true, Some(0x1_10ff)),
    (0x838, true, Some(0xffff_ffff)),
    (0x839, true, None),
    (0x83e, true, Some(0xb)),
    (0x83f, false, Some(0xff)),
];

#[test]
fn x2apic_registers_fault_where_they_should() {
    for (msr, readable, defined) in X2APIC_MSRS {
        let mut apic = x2apic();
        assert_eq!(apic.msr_read(NOW, msr).is_ok(), readable, "{msr:#x}");
        for bit in 0..64 {
            let allowed = defined.is_some_and(|defined| defined >> bit & 1 != 0);
            let mut apic = apic.clone();
            let result = apic.msr_write(NOW, msr, 1 << bit);
            assert_eq!(result.is_ok(), allowed, "{msr:#x} bit {bit}");
        }
        let mut outside = xapic();
        assert_eq!(outside.msr_read(NOW, msr), Err(Fault));
        assert_eq!(outside.msr_write(NOW, msr, 0), Err(Fault));
    }
    let mut apic = x2apic();
    for msr in 0x800..=0x8ff {
        let listed = X2APIC_MSRS.iter().any(|&(listed, ..)| listed == msr);
        if !listed && !(0x810..=0x827).contains(&msr) {
            assert_eq!(apic.msr_read(NOW, msr), Err(Fault), "{msr:#x}");
            assert_eq!(apic.msr_write(NOW, msr, 0), Err(Fault), "{msr:#x}");
        }
    }
    for msr in [0, 0x7ff, 0x900, u32::MAX] {
        assert_eq!(apic.msr_read(NOW, msr), Err(Fault));
    }
}

/// What a write to the ICR in xAPIC mode sends, with 5 in the destination field.
fn sent(low: u64) -> Option<Message> {
    let mut apic = xapic();
    set(&mut apic, 0x310, 0x0500_0000);
    match set(&mut apic, 0x300, low)? {
        Action::Send(message) => Some(message),
        Action::BroadcastEoi(_) => None,
    }
}

#[test]
fn commands_of_an_xapic() {
    let edge = |mode, destination, vector| Message {
        mode,
        destination,
        vector,
        trigger: Trigger::Edge,
        assert: true,
    };
    for (low, message) in [
        (0x0_4031, edge(Fixed, Destination::Physical(5), 0x31)),
        (0x0_0831, edge(Fixed, Destination::Logical(5), 0x31)),
        (
            0x0_4931,
            edge(LowestPriority, Destination::Logical(5), 0x31),
        ),
        (0x0_c031, edge(Fixed, Destination::Physical(5), 0x31)),
        (0x8_4031, edge(Fixed, Destination::All, 0x31)),
        (0xc_40fd, edge(Fixed, Destination::Others, 0xfd)),
        (0x0_0200, edge(Smi, Destination::Physical(5), 0)),
        (0x4_4400, edge(Nmi, Destination::Itself, 0)),
        (0xc_4402, edge(Nmi, Destination::Others, 2)),
        (0xc_4500, edge(Init, Destination::Others, 0)),
        (0x0_c500, edge(Init, Destination::Physical(5), 0)),
        (0x0_4699, edge(StartUp, Destination::Physical(5), 0x99)),
    ] {
        assert_eq!(sent(low), Some(message), "{low:#x}");
    }
    assert_eq!(
        sent(0x0_8500),
        Some(Message {
            trigger: Trigger::Level,
            assert: false,
            ..edge(Init, Destination::Physical(5), 0)
        })
    );
    // Reserved modes, and a reset or start of the sender.
    for low in [0x4331, 0x4731, 0x4_4500, 0x8_4500, 0x4_4608, 0x8_4608] {
        assert_eq!(sent(low), None, "{low:#x}");
    }
}

#[test]
fn the_command_register_reads_back_idle() {
    let mut apic = xapic();
    set(&mut apic, 0x310, 0xffff_ffff);
    set(&mut apic, 0x300, 0xffff_fffe);
    assert_eq!(get(&mut apic, 0x300), 0xc_cffe);
    assert_eq!(get(&mut apic, 0x310), 0xff00_0000);
    let Some(Action::Send(message)) = set(&mut apic, 0x300, 0x4031) else {
        panic!("nothing was sent")
    };
    assert_eq!(message.destination, Destination::All);
}

#[test]
fn commands_of_an_x2apic() {
    let mut apic = x2apic();
    let mut destination = |value| match apic.msr_write(NOW, 0x830, value) {
        Ok(Some(Action::Send(message))) => message.destination,
        other => panic!("{other:?}"),
    };
    assert_eq!(destination(0x1_0000_4031), Destination::Physical(1));
    assert_eq!(destination(0xff_0000_4031), Destination::Physical(0xff));
    assert_eq!(destination(0xffff_ffff_0000_4031), Destination::All);
    assert_eq!(
        destination(0x0012_0008_0000_0831),
        Destination::Logical(0x0012_0008)
    );
    // All 64 bits in one place, as the CPU keeps them when it virtualizes the page.
    assert_eq!(apic.msr_read(NOW, 0x830), Ok(0x0012_0008_0000_0831));
    assert_eq!(apic.page().get(0x304), 0x0012_0008);
}

#[test]
fn a_fixed_interrupt_to_itself_needs_no_message() {
    let mut apic = x2apic();
    for (msr, value) in [(0x83f, 0x33), (0x830, 0x4_4033), (0x830, 0x3_0000_4033)] {
        assert_eq!(apic.msr_write(NOW, msr, value), Ok(None));
        assert_eq!(apic.acknowledge(), Some(0x33));
        assert_eq!(apic.msr_write(NOW, 0x80b, 0), Ok(None));
    }
}

#[test]
fn an_illegal_vector_is_not_sent() {
    for low in [0x400f, 0x4_400f, 0x490f] {
        let mut apic = xapic();
        assert_eq!(set(&mut apic, 0x300, low), None);
        assert_eq!(errors(&mut apic), 1 << 5);
    }
    let mut apic = x2apic();
    assert_eq!(apic.msr_write(NOW, 0x83f, 0x0f), Ok(None));
    apic.msr_write(NOW, 0x828, 0).unwrap();
    assert_eq!(apic.msr_read(NOW, 0x828), Ok(1 << 5));
    assert_eq!(apic.pending(), None);
}
