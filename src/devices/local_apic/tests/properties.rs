//! Rules that hold whatever the guest does.

use super::*;
use proptest::prelude::*;

/// What a guest, its devices and time can do.
#[derive(Clone, Copy, Debug)]
enum Step {
    MmioWrite(u64, Width, u64),
    MmioRead(u64, Width),
    MsrWrite(u32, u64),
    MsrRead(u32),
    Base(u64),
    TscDeadline(u64),
    Cr8(u8),
    Accept(DeliveryMode, u8, Trigger),
    Lint(bool, bool),
    Acknowledge,
    Eoi,
    Wait(u64),
}

fn width() -> impl Strategy<Value = Width> {
    prop::sample::select(vec![Width::Byte, Width::Word, Width::Dword, Width::Qword])
}

/// Small numbers, large ones, and single bits.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..0x1000u64,
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..8u64, 0..256u64).prop_map(|(mode, vector)| mode << 16 | vector),
    ]
}

fn trigger() -> impl Strategy<Value = Trigger> {
    prop::sample::select(vec![Trigger::Edge, Trigger::Level])
}

fn step() -> impl Strategy<Value = Step> {
    let modes = (0..8u32).prop_filter_map("reserved", DeliveryMode::from_bits);
    let registers = (0..0x40u64).prop_map(|index| index << 4);
    prop_oneof![
        4 => (registers, value()).prop_map(|(offset, value)| Step::MmioWrite(offset, Width::Dword, value)),
        1 => (0..0x1100u64, width(), value()).prop_map(|(offset, width, value)| Step::MmioWrite(offset, width, value)),
        2 => (0..0x1100u64, width()).prop_map(|(offset, width)| Step::MmioRead(offset, width)),
        4 => (0x7fe..0x902u32, value()).prop_map(|(msr, value)| Step::MsrWrite(msr, value)),
        2 => (0x7fe..0x902u32).prop_map(Step::MsrRead),
        1 => prop_oneof![
            prop::sample::select(vec![0xfee0_0000, 0xfee0_0800, 0xfee0_0c00]),
            any::<u64>(),
        ].prop_map(Step::Base),
        1 => value().prop_map(Step::TscDeadline),
        1 => any::<u8>().prop_map(Step::Cr8),
        6 => (modes, any::<u8>(), trigger()).prop_map(|(mode, vector, trigger)| Step::Accept(mode, vector, trigger)),
        2 => any::<(bool, bool)>().prop_map(|(pin, level)| Step::Lint(pin, level)),
        4 => Just(Step::Acknowledge),
        3 => Just(Step::Eoi),
        2 => prop_oneof![0..100_000u64, any::<u64>()].prop_map(Step::Wait),
    ]
}

fn take(apic: &mut LocalApic, now: &mut Ticks, step: Step) {
    match step {
        Step::MmioWrite(offset, width, value) => {
            apic.mmio_write(*now, offset, width, value);
        }
        Step::MmioRead(offset, width) => {
            assert!(apic.mmio_read(*now, offset, width) <= width.mask());
        }
        Step::MsrWrite(msr, value) => {
            let _ = apic.msr_write(*now, msr, value);
        }
        Step::MsrRead(msr) => {
            let _ = apic.msr_read(*now, msr);
        }
        Step::Base(value) => {
            let _ = apic.set_base_msr(*now, value);
        }
        Step::TscDeadline(value) => apic.set_tsc_deadline(*now, value),
        Step::Cr8(value) => apic.set_cr8(value),
        Step::Accept(mode, vector, trigger) => {
            apic.accept(message(mode, vector, trigger));
        }
        Step::Lint(pin, level) => {
            if pin {
                apic.set_lint1(level);
            } else {
                apic.set_lint0(level);
            }
        }
        Step::Acknowledge => {
            apic.acknowledge();
        }
        Step::Eoi => {
            apic.eoi();
        }
        Step::Wait(ticks) => now.0 = now.0.saturating_add(ticks),
    }
}

/// SDM 3, 12.8.3.1, from the page alone.
fn priority(page: &ApicPage) -> u32 {
    let tpr = page.get(register::TPR);
    let in_service = highest(page, register::ISR).unwrap_or(0);
    let class = u32::from(in_service >> 4);
    if tpr >> 4 >= class { tpr } else { class << 4 }
}

proptest! {
    #[test]
    fn any_sequence_keeps_the_rules(steps in prop::collection::vec(step(), 0..300), x2: bool) {
        let mut apic = if x2 { x2apic() } else { xapic() };
        let mut now = NOW;
        for step in steps {
            take(&mut apic, &mut now, step);
            apic.advance(now);
            if now.0 < u64::MAX {
                prop_assert!(apic.deadline().is_none_or(|deadline| deadline > now), "{:?}", step);
            }
            let page = apic.page();
            prop_assert_eq!(apic.processor_priority(), priority(page), "{:?}", step);
            let enabled = apic.mode() != Mode::Disabled && page.get(register::SVR) & 1 << 8 != 0;
            let expected = highest(page, register::IRR)
                .filter(|&vector| enabled && u32::from(vector >> 4) > priority(page) >> 4);
            prop_assert_eq!(apic.pending(), expected, "{:?}", step);
            for base in [register::IRR, register::ISR] {
                prop_assert_eq!(page.get(base) & 0xffff, 0, "a vector below 16");
            }
            let masked = |offset| page.get(offset) & 1 << 16 != 0;
            prop_assert!(page.get(register::SVR) & 1 << 8 != 0 || (0x32..=0x37).all(|index| masked(index << 4)));
        }
    }

    /// Against a model that keeps the vectors in service on a stack: a higher class
    /// nests, an EOI takes the top.
    #[test]
    fn interrupts_nest(steps in prop::collection::vec((0..4u8, 16..=255u8), 0..200)) {
        let mut apic = xapic();
        let mut requested = [false; 256];
        let mut stack: Vec<u8> = Vec::new();
        let mut tpr = 0;
        for (kind, vector) in steps {
            match kind {
                0 | 1 => {
                    apic.accept(fixed(vector, Trigger::Level));
                    requested[usize::from(vector)] = true;
                }
                2 => {
                    let highest = (16..=255u8).rev().find(|&vector| requested[usize::from(vector)]);
                    let floor = stack.last().map_or(0, |top| top >> 4).max(tpr);
                    let expected = highest.filter(|vector| vector >> 4 > floor);
                    prop_assert_eq!(apic.acknowledge(), expected);
                    if let Some(vector) = expected {
                        requested[usize::from(vector)] = false;
                        stack.push(vector);
                    }
                }
                _ if vector & 1 == 0 => {
                    prop_assert_eq!(apic.eoi(), stack.pop());
                }
                _ => {
                    tpr = vector >> 4;
                    apic.set_cr8(tpr);
                }
            }
        }
    }

    #[test]
    fn a_current_count_never_rises_within_a_period(count in 1..=u32::MAX, divide in 0..16u64, hz in 1_000_000..5_000_000_000u64, step in 1..1u64 << 33) {
        let mut apic = LocalApic::new(0, true, Clock::new(hz));
        set(&mut apic, 0x3e0, divide);
        set(&mut apic, 0x320, 0xec);
        set(&mut apic, 0x380, count.into());
        let deadline = apic.deadline().unwrap();
        let mut now = NOW;
        let mut last = u64::from(count);
        for _ in 0..20 {
            let value = apic.mmio_read(now, 0x390, Width::Dword);
            prop_assert!(value <= last);
            prop_assert_eq!(value == 0, now >= deadline);
            last = value;
            now.0 += step;
        }
    }

    /// However the count and the looks at it fall, periodic interrupts come at
    /// multiples of the period, and never closer than the shortest one.
    #[test]
    fn periods_are_kept(count in 1..100_000u32, looks in prop::collection::vec(0..50_000u64, 1..50)) {
        let mut apic = LocalApic::new(0, true, Clock::new(APIC_TIMER_HZ));
        set(&mut apic, 0x3e0, 0xb);
        set(&mut apic, 0x320, 0x2_00ec);
        set(&mut apic, 0x380, count.into());
        let mut now = NOW;
        for look in looks {
            let deadline = apic.deadline().unwrap();
            prop_assert_eq!(deadline.0 % u64::from(count), 0);
            now.0 += look;
            apic.advance(now);
            let next = apic.deadline().unwrap();
            if deadline <= now {
                prop_assert_eq!(apic.acknowledge(), Some(0xec));
                apic.eoi();
                prop_assert!(next > now);
                let shortest = if u64::from(count) < MIN_PERIOD { MIN_PERIOD } else { u64::from(count) };
                prop_assert!(next.0 - deadline.0 >= shortest);
            } else {
                prop_assert_eq!(next, deadline);
            }
        }
    }

    /// The short ways of a command to oneself do what a write of the register does.
    #[test]
    fn self_ipis_are_commands(
        low in prop_oneof![any::<u32>(), (16..=255u32, any::<bool>()).prop_map(|(vector, short)| vector | u32::from(short) << 18)],
        destination in prop_oneof![Just(3u32), Just(0xff), any::<u32>()], enabled: bool,
    ) {
        let start = if enabled { xapic() } else { disabled() };
        let mut general = start.clone();
        set(&mut general, 0x310, u64::from(destination) << 24);
        let mut short = general.clone();
        let action = set(&mut general, 0x300, low.into());
        if short.xapic_self_ipi(low) {
            prop_assert_eq!((format!("{short:?}"), action), (format!("{general:?}"), None));
        } else {
            prop_assert!(low & 0xfff00 != 1 << 18 && (low & 0xcff00 != 0 || destination as u8 != 3));
        }

        let mut general = x2apic();
        let mut short = general.clone();
        let command = u64::from(destination) << 32 | u64::from(low & 0xc_cfff);
        let action = general.msr_write(NOW, 0x830, command);
        if short.x2apic_self_ipi(command) {
            prop_assert_eq!((format!("{short:?}"), action), (format!("{general:?}"), Ok(None)));
        }
    }
}
