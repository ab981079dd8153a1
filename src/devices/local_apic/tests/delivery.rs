//! From a message to its EOI; destinations; LINT pins.

use super::*;

#[test]
fn a_higher_class_interrupts_a_lower_one() {
    let mut apic = xapic();
    apic.accept(fixed(0x41, Trigger::Edge));
    assert_eq!(get(&mut apic, 0x220), 1 << 1);
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(get(&mut apic, 0x220), 0);
    assert_eq!(get(&mut apic, 0x120), 1 << 1);
    assert_eq!(get(&mut apic, 0xa0), 0x40);
    apic.accept(fixed(0x4f, Trigger::Edge));
    assert_eq!(apic.pending(), None, "same class");
    apic.accept(fixed(0x51, Trigger::Edge));
    assert_eq!(apic.acknowledge(), Some(0x51));
    assert_eq!(get(&mut apic, 0xa0), 0x50);
    assert_eq!(apic.eoi(), None);
    assert_eq!(get(&mut apic, 0xa0), 0x40);
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.acknowledge(), Some(0x4f));
    assert_eq!(apic.eoi(), None);
    assert_eq!(get(&mut apic, 0xa0), 0);
    assert_eq!(apic.eoi(), None, "nothing is in service");
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let mut apic = xapic();
    apic.set_cr8(5);
    assert_eq!(get(&mut apic, 0x80), 0x50);
    assert_eq!(get(&mut apic, 0xa0), 0x50);
    apic.accept(fixed(0x5f, Trigger::Edge));
    assert_eq!(apic.pending(), None);
    set(&mut apic, 0x80, 0x4f);
    assert_eq!(apic.cr8(), 4);
    assert_eq!(get(&mut apic, 0xa0), 0x4f);
    assert_eq!(apic.acknowledge(), Some(0x5f));
    assert_eq!(get(&mut apic, 0xa0), 0x50);
    set(&mut apic, 0x80, 0x6a);
    assert_eq!(get(&mut apic, 0xa0), 0x6a);
}

#[test]
fn the_page_written_by_the_cpu_counts_after_a_refresh() {
    let mut apic = xapic();
    apic.accept(fixed(0x5f, Trigger::Edge));
    apic.page.set(register::TPR, 0x60);
    apic.refresh();
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.processor_priority(), 0x60);
}

#[test]
fn the_page_can_be_given_to_the_cpu() {
    let apic = xapic();
    assert_eq!(core::mem::size_of::<ApicPage>(), 4096);
    assert_eq!(core::ptr::from_ref(apic.page()).addr() % 4096, 0);
}

#[test]
fn the_arbitration_priority() {
    let mut apic = xapic();
    apic.set_cr8(4);
    assert_eq!(get(&mut apic, 0x90), 0x40);
    apic.accept(fixed(0x75, Trigger::Edge));
    assert_eq!(get(&mut apic, 0x90), 0x70);
    apic.acknowledge();
    // In service 7, TPR 4, nothing requested: 4 AND 7.
    assert_eq!(get(&mut apic, 0x90), 0x40);
    apic.set_cr8(8);
    assert_eq!(apic.arbitration_priority(), 0x80);
}

#[test]
fn only_a_level_triggered_interrupt_is_ended_elsewhere() {
    let mut apic = xapic();
    apic.accept(fixed(0x51, Trigger::Level));
    assert_eq!(get(&mut apic, 0x1a0), 1 << 17);
    apic.acknowledge();
    assert_eq!(set(&mut apic, 0xb0, 0), Some(Action::BroadcastEoi(0x51)));
    apic.accept(fixed(0x51, Trigger::Edge));
    assert_eq!(get(&mut apic, 0x1a0), 0);
    apic.acknowledge();
    assert_eq!(set(&mut apic, 0xb0, 0), None);
}

#[test]
fn the_broadcast_can_be_suppressed_if_offered() {
    for offered in [false, true] {
        let mut apic = disabled().with_config(Config {
            eoi_broadcast_suppression: offered,
            ..Config::default()
        });
        assert_eq!(get(&mut apic, 0x30) >> 24, u64::from(offered));
        set(&mut apic, 0xf0, 0x11ff);
        let svr = if offered { 0x11ff } else { 0x1ff };
        assert_eq!(get(&mut apic, 0xf0), svr);
        apic.accept(fixed(0x51, Trigger::Level));
        apic.acknowledge();
        let told = (!offered).then_some(0x51);
        assert_eq!(apic.eoi(), told);
    }
}

#[test]
fn disabled_by_software_it_keeps_what_it_has_and_takes_nothing_more() {
    let mut apic = xapic();
    set(&mut apic, 0x320, 0xec);
    apic.accept(fixed(0x41, Trigger::Edge));
    set(&mut apic, 0xf0, 0xff);
    assert_eq!(apic.pending(), None);
    apic.accept(fixed(0x91, Trigger::Edge));
    for (mode, event) in [
        (DeliveryMode::Nmi, Event::Nmi),
        (DeliveryMode::Smi, Event::Smi),
        (DeliveryMode::StartUp, Event::StartUp(0x91)),
    ] {
        assert_eq!(apic.accept(message(mode, 0x91, Trigger::Edge)), event);
    }
    assert_eq!(get(&mut apic, 0x320), 0x1_00ec, "masked");
    set(&mut apic, 0x320, 0xec);
    assert_eq!(get(&mut apic, 0x320), 0x1_00ec, "stays masked");
    set(&mut apic, 0xf0, 0x1ff);
    assert_eq!(get(&mut apic, 0x320), 0x1_00ec, "until it is unmasked");
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(apic.pending(), None);
}

#[test]
fn init_resets_all_but_mode_and_identity() {
    for mut apic in [xapic(), x2apic()] {
        let (mode, base) = (apic.mode(), apic.base_msr());
        let id = apic.page().get(register::ID);
        apic.accept(fixed(0x41, Trigger::Level));
        apic.acknowledge();
        apic.accept(fixed(0x51, Trigger::Level));
        apic.set_cr8(2);
        let init = message(DeliveryMode::Init, 0, Trigger::Edge);
        let deassert = Message {
            trigger: Trigger::Level,
            assert: false,
            ..init
        };
        assert_eq!(apic.accept(deassert), Event::None);
        assert_eq!(apic.cr8(), 2);
        assert_eq!(apic.accept(init), Event::Init);
        assert_eq!((apic.mode(), apic.base_msr()), (mode, base));
        assert_eq!(apic.page().get(register::ID), id);
        assert_eq!(apic.page().get(register::SVR), 0xff);
        assert_eq!(apic.page().get(register::LVT_TIMER), 0x1_0000);
        for base in [register::IRR, register::ISR, register::TMR] {
            assert_eq!(highest(apic.page(), base), None);
        }
        assert_eq!(apic.cr8(), 0);
        if mode == Mode::X2Apic {
            assert_eq!(apic.msr_read(NOW, 0x80d), Ok(8));
        }
    }
}

#[test]
fn an_illegal_vector_is_received_as_an_error() {
    let mut apic = xapic();
    set(&mut apic, 0x370, 0xfe);
    apic.accept(fixed(0x0f, Trigger::Edge));
    assert_eq!(get(&mut apic, 0x280), 0, "until it is written");
    assert_eq!(apic.acknowledge(), Some(0xfe));
    apic.eoi();
    apic.accept(fixed(0x0e, Trigger::Edge));
    assert_eq!(apic.pending(), None, "the trigger is armed by a write");
    assert_eq!(errors(&mut apic), 1 << 6);
    assert_eq!(errors(&mut apic), 0);
    apic.accept(fixed(0x0e, Trigger::Edge));
    assert_eq!(apic.acknowledge(), Some(0xfe));
}

#[test]
fn an_error_interrupt_with_an_illegal_vector_is_an_error() {
    let mut apic = xapic();
    set(&mut apic, 0x370, 0x03);
    get(&mut apic, 0x40);
    assert_eq!(errors(&mut apic), 1 << 7 | 1 << 6);
    assert_eq!(apic.pending(), None);
}

#[test]
fn destinations_of_an_xapic() {
    let mut apic = xapic();
    assert!(apic.is_destination(Destination::Physical(3), false));
    assert!(!apic.is_destination(Destination::Physical(4), false));
    assert!(!apic.is_destination(Destination::Physical(0x103), false));
    assert!(apic.is_destination(Destination::All, false));
    assert!(apic.is_destination(Destination::All, true));
    assert!(apic.is_destination(Destination::Others, false));
    assert!(!apic.is_destination(Destination::Others, true));
    assert!(apic.is_destination(Destination::Itself, true));
    assert!(!apic.is_destination(Destination::Itself, false));

    let logical =
        |apic: &LocalApic, address| apic.is_destination(Destination::Logical(address), false);
    assert!(
        logical(&apic, 0xff) && !logical(&apic, 0xfe),
        "no logical identifier yet"
    );
    set(&mut apic, 0xd0, 0x0200_0000);
    assert!(logical(&apic, 0x03) && logical(&apic, 0xff));
    assert!(!logical(&apic, 0x04) && !logical(&apic, 0x102));
    set(&mut apic, 0xe0, 0);
    set(&mut apic, 0xd0, 0x1200_0000);
    assert!(logical(&apic, 0x12) && logical(&apic, 0x13) && logical(&apic, 0xff));
    assert!(!logical(&apic, 0x22) && !logical(&apic, 0x11) && !logical(&apic, 0xf2));
}

#[test]
fn destinations_of_an_x2apic() {
    let clock = Clock::new(HZ);
    let mut apic = LocalApic::new(0x123, false, clock);
    assert!(apic.is_destination(Destination::Physical(0x23), false));
    let base = apic.base_msr();
    apic.set_base_msr(NOW, base | 1 << 10).unwrap();
    // Cluster 0x12, member 3.
    assert_eq!(apic.msr_read(NOW, 0x80d), Ok(0x0012_0008));
    assert_eq!(apic.msr_read(NOW, 0x802), Ok(0x123));
    for (destination, meant) in [
        (Destination::Physical(0x123), true),
        (Destination::Physical(0x23), false),
        (Destination::Logical(0x0012_0008), true),
        (Destination::Logical(0x0012_ffff), true),
        (Destination::Logical(0x0012_fff7), false),
        (Destination::Logical(0x0013_0008), false),
        (Destination::Logical(0xffff_ffff), true),
        (Destination::Logical(0xff), false),
    ] {
        assert_eq!(
            apic.is_destination(destination, false),
            meant,
            "{destination:x?}"
        );
    }
}

#[test]
fn globally_disabled_it_is_out_of_the_way() {
    let mut apic = xapic();
    assert!(!apic.lint0_takes_extint());
    apic.set_base_msr(NOW, 0xfee0_0000).unwrap();
    assert!(!apic.is_destination(Destination::All, false));
    assert!(apic.lint0_takes_extint());
    assert_eq!(apic.set_lint1(true), Event::Nmi);
    assert_eq!(apic.set_lint1(true), Event::None);
    assert_eq!(apic.accept(fixed(0x41, Trigger::Edge)), Event::None);
    assert_eq!(apic.pending(), None);
}

#[test]
fn lint0_passes_the_8259s_on_when_it_is_programmed_to() {
    assert!(LocalApic::new(0, true, Clock::new(HZ)).lint0_takes_extint());
    let mut apic = disabled();
    assert!(!apic.lint0_takes_extint());
    set(&mut apic, 0xf0, 0x1ff);
    set(&mut apic, 0x350, 0x700);
    assert!(apic.lint0_takes_extint());
    set(&mut apic, 0x350, 0x1_0700);
    assert!(!apic.lint0_takes_extint());
    set(&mut apic, 0x350, 0x31);
    assert!(!apic.lint0_takes_extint());
}

#[test]
fn lint_edges() {
    let mut apic = xapic();
    set(&mut apic, 0x350, 0x31);
    assert_eq!(apic.set_lint0(true), Event::None);
    assert_eq!(apic.acknowledge(), Some(0x31));
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.set_lint0(true), Event::None);
    assert_eq!(apic.pending(), None, "no edge");

    set(&mut apic, 0x360, 0x400);
    assert_eq!(apic.set_lint1(true), Event::Nmi);
    assert_eq!(apic.set_lint1(true), Event::None);
    apic.set_lint1(false);
    set(&mut apic, 0x360, 0x1_0400);
    assert_eq!(apic.set_lint1(true), Event::None);
}

#[test]
fn a_level_triggered_lint_pin_waits_for_its_eoi() {
    let mut apic = xapic();
    set(&mut apic, 0x350, 0x8031);
    apic.set_lint0(true);
    assert_eq!(get(&mut apic, 0x350), 0xc031);
    assert_eq!(apic.acknowledge(), Some(0x31));
    apic.set_lint0(true);
    set(&mut apic, 0x350, 0x8031);
    assert_eq!(get(&mut apic, 0x350), 0xc031);
    assert_eq!(highest(apic.page(), register::IRR), None);
    apic.eoi();
    assert_eq!(apic.acknowledge(), Some(0x31), "still high");
    apic.set_lint0(false);
    apic.eoi();
    assert_eq!(apic.pending(), None);
    assert_eq!(get(&mut apic, 0x350), 0x8031);
}
