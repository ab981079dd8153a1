//! The boot of the hypervisor.
#![no_std]
#![no_main]
