//! What the integration tests provoke: the ways in which the hypervisor itself
//! may die, and a check of its page tables. Only in builds with the feature
//! `selftest`.
//!
//! The test is named on the first guest's command line: `vireo.selftest=NAME`.

use super::memory::paging;
use super::{interrupts, local_apic};
use crate::addr::Hpa;
use core::arch::asm;
use core::fmt;
use core::hint::black_box;
use vireo_handoff::{BootInfo, MemoryKind, layout};

/// Announces the test's name in a command line.
const KEY: &str = "vireo.selftest=";

/// Runs the test that the configuration names; returns when there is none, or
/// when it was no test of dying.
pub fn run(boot: &BootInfo) {
    let words = boot
        .config
        .vm
        .iter()
        .flat_map(|vm| vm.cmdline.split_whitespace());
    for name in words.filter_map(|word| word.strip_prefix(KEY)) {
        match name {
            "panic" => panic!("self-test"),
            "panic-in-panic" => panic!("{}", Unprintable),
            "page-fault" => page_fault(),
            "double-fault" => {
                black_box(overflow(black_box(1)));
            }
            "machine-check" => machine_check(),
            "nmi" => nmi(),
            "page-tables" => page_tables(boot),
            _ => log::error!("no self-test is called {name}"),
        }
    }
}

struct Unprintable;

impl fmt::Display for Unprintable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("self-test: no text")
    }
}

fn page_fault() {
    // SAFETY: an address of the dynamic area that nothing is ever mapped at, as it is the
    // guard page of the first mapping: the CPU answers with the page fault that is wanted.
    unsafe { (layout::DYNAMIC as *const u8).read_volatile() };
}

/// Recurses until the stack runs into its guard page.
#[allow(unconditional_recursion)]
fn overflow(depth: u64) -> u64 {
    let room = black_box([depth; 64]);
    overflow(depth + 1) + room[black_box(depth as usize % 64)]
}

fn machine_check() {
    // SAFETY: enters the handler of machine checks, which does not return.
    unsafe { asm!("int 18") };
}

fn nmi() {
    interrupts::on_nmi(|_| panic!("self-test: NMI"));
    local_apic::send(local_apic::Command::nmi(local_apic::Target::Cpu(
        local_apic::id(),
    )));
    for _ in 0..1_000_000 {
        core::hint::spin_loop();
    }
}

/// Looks at every page that is mapped: none may be written and executed, and
/// the direct map may hold nothing but RAM.
fn page_tables(boot: &BootInfo) {
    let is_ram = |start: u64, len: u64| {
        let mut at = start;
        for region in &boot.memory {
            let is_memory = !matches!(region.kind, MemoryKind::Mmio | MemoryKind::Reserved);
            if is_memory && region.start <= at && at < region.start + region.len {
                at = region.start + region.len;
            }
        }
        at >= start + len
    };
    let (mut pages, mut wrong) = (0u64, 0u64);
    paging::for_each_page(|page| {
        pages += 1;
        let direct = (layout::DIRECT_MAP..layout::DYNAMIC).contains(&page.virt.0);
        let bad = page.writable && page.executable
            || direct
                && (page.virt != paging::to_virt(page.phys) || !is_ram(page.phys.0, page.len));
        if bad {
            wrong += 1;
            log::error!("self-test: {page:?}");
        }
    });
    let image = Hpa(boot.kernel_start);
    let unmapped = paging::translate(paging::to_virt(image)).is_none();
    log::info!(
        "self-test: {pages} pages mapped, {wrong} wrongly; the image is {}in the direct map",
        if unmapped { "not " } else { "" }
    );
}
