//! The parts of the UEFI loader that know nothing of UEFI, so that they are
//! tested on the development host.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod paging;
pub mod regions;
