//! An APIC whose interrupts the CPU delivers: the CPU's part is played here, by the
//! page alone, as SDM 3, 30.2 has it.

use super::*;
use crate::devices::local_apic::page::ApicPage;
use proptest::prelude::*;

/// Virtual-interrupt delivery: the CPU's two registers, and what it does to the page.
#[derive(Default)]
struct Cpu {
    requested: u8,
    in_service: u8,
}

impl Cpu {
    /// What the hypervisor does before an entry.
    fn enter(&mut self, apic: &mut LocalApic) {
        if let Some(vector) = apic.take_requests() {
            self.requested = self.requested.max(vector);
        }
    }

    /// Takes an interrupt, if the priority lets one through.
    fn take(&mut self, page: &mut ApicPage) -> Option<u8> {
        let tpr = page.get(register::TPR) as u8;
        let vector = self.requested;
        if vector >> 4 <= (tpr >> 4).max(self.in_service >> 4) {
            return None;
        }
        page.clear_vector(register::IRR, vector);
        page.set_vector(register::ISR, vector);
        self.in_service = vector;
        self.requested = highest(page, register::IRR).unwrap_or(0);
        Some(vector)
    }

    /// Ends one; the vector where the EOI-exit bitmap names it.
    fn end(&mut self, page: &mut ApicPage, level: [u64; 4]) -> Option<u8> {
        let vector = self.in_service;
        page.clear_vector(register::ISR, vector);
        self.in_service = highest(page, register::ISR).unwrap_or(0);
        (level[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0).then_some(vector)
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Request(u8, Trigger),
    Take,
    End,
    Priority(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let vector = 16..=255u8;
    prop_oneof![
        (
            vector,
            prop_oneof![Just(Trigger::Edge), Just(Trigger::Level)]
        )
            .prop_map(|(vector, trigger)| Step::Request(vector, trigger)),
        Just(Step::Take),
        Just(Step::End),
        (0..16u8).prop_map(|class| Step::Priority(class << 4)),
    ]
}

proptest! {
    /// Whoever delivers: the same vectors in the same order, and the I/O APIC is told alike.
    #[test]
    fn the_cpu_delivers_what_the_hypervisor_would(
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let mut own = xapic();
        let mut apic = xapic().delivered_by_cpu(true);
        let mut cpu = Cpu::default();
        let mut level = apic.take_level_vectors();
        for step in steps {
            match step {
                Step::Request(vector, trigger) => {
                    own.accept(fixed(vector, trigger));
                    apic.accept(fixed(vector, trigger));
                    cpu.enter(&mut apic);
                    if apic.has_new_trigger() {
                        level = apic.take_level_vectors();
                    }
                }
                Step::Take => prop_assert_eq!(cpu.take(&mut apic.page), own.acknowledge()),
                Step::End => {
                    let told = own.eoi();
                    let exit = cpu.end(&mut apic.page, level);
                    prop_assert_eq!(exit.filter(|&vector| apic.end_level(vector)), told);
                }
                Step::Priority(tpr) => {
                    own.set_cr8(tpr >> 4);
                    apic.page.set(register::TPR, tpr.into());
                }
            }
            // What is found out from the page is what the CPU has.
            let mut seen = apic.clone();
            seen.refresh();
            let status = u16::from_le_bytes([cpu.requested, cpu.in_service]);
            prop_assert_eq!(seen.interrupt_status(), status);
            prop_assert_eq!(seen.pending(), own.pending());
            prop_assert_eq!(get(&mut apic, 0xa0), get(&mut own, 0xa0));
        }
    }
}

#[test]
fn a_write_to_the_page_does_what_a_write_by_an_exit_does() {
    let mut apic = xapic().delivered_by_cpu(true);
    // The identifier cannot be written, and an entry keeps its reserved bits.
    apic.page.set(register::ID, 0x7700_0000);
    apic.written(NOW, register::ID);
    assert_eq!(get(&mut apic, 0x20), 3 << 24);
    apic.page.set(register::LVT_ERROR, 0xffff_ffff);
    apic.written(NOW, register::LVT_ERROR);
    assert_eq!(get(&mut apic, 0x370), 0x1_00ff);
    // An IPI to everybody leaves the APIC.
    apic.page.set(register::ICR, 0x8_0031);
    assert!(matches!(
        apic.written(NOW, register::ICR),
        Some(Action::Send(Message {
            vector: 0x31,
            destination: Destination::All,
            ..
        }))
    ));
}

#[test]
fn a_self_ipi_that_the_cpu_does_not_deliver_is_an_error() {
    let mut apic = x2apic().delivered_by_cpu(true);
    apic.page.set(register::SELF_IPI, 5);
    assert_eq!(apic.written(NOW, register::SELF_IPI), None);
    assert_eq!(apic.take_requests(), None);
    apic.msr_write(NOW, 0x828, 0).unwrap();
    assert_eq!(apic.msr_read(NOW, 0x828), Ok(1 << 5));
}

#[test]
fn the_threshold_is_the_class_that_only_the_task_priority_holds_back() {
    let mut apic = xapic();
    assert_eq!(apic.threshold(), 0);
    apic.accept(fixed(0x51, Trigger::Edge));
    assert_eq!(apic.threshold(), 0, "it is deliverable");
    apic.set_cr8(7);
    assert_eq!(apic.threshold(), 5);
    apic.set_cr8(5);
    assert_eq!(apic.threshold(), 5);
    apic.set_cr8(0);
    apic.accept(fixed(0x81, Trigger::Edge));
    assert_eq!(apic.acknowledge(), Some(0x81));
    apic.set_cr8(7);
    assert_eq!(apic.threshold(), 0, "what is in service holds it back too");
}
