//! vmx: being built.

pub mod bitmap;
pub mod check;
pub mod ept;
pub mod error;
pub mod memory_type;
pub mod vpid;
