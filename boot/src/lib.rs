//! Parts of the loader that need no firmware, so that they are tested on the host.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod paging;
