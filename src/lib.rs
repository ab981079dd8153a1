//! Vireo, a bare-metal type-1 hypervisor for x86-64.
//!
//! Floors, lowest first; each imports what is below it and nothing above:
//!
//! | module | what it is |
//! | --- | --- |
//! | [`addr`], [`arch`], [`sync`] | typed addresses; thin, typed wrappers of x86; atomics |
//! | [`host`] | the machine below: tables, memory, interrupts, time, serial |
//! | [`vmx`] | VT-x and nothing else: capabilities, VMCS, EPT, exits, the entry and exit stub |
//! | [`devices`] | what a guest finds on its buses; plain objects, no VT-x |
//! | [`vm`] | one guest: memory slots, boot protocols, the tables it is shown |
//! | [`vcpu`] | one virtual CPU: run loop, fast path, injection, CPUID and MSR policy |
//! | [`monitor`] | the operator's view: log, console, statistics |
//!
//! "SDM" is the *Intel 64 and IA-32 Architectures Software Developer's Manual* by
//! volume and section, in the numbering of the editions from 2023 on: in volume 3,
//! paging is chapter 5, the local APIC 12, VM entries 27 and VM exits 28.
//! Earlier editions have the same sections one or two chapters before.
//!
//! The library builds for the host too, so that its logic is tested by `cargo test`.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod addr;
pub mod arch;
pub mod devices;
#[cfg(test)]
mod fuzz;
pub mod host;
pub mod monitor;
pub mod sync;
pub mod vcpu;
pub mod vm;
pub mod vmx;
