//! vmx: being built.

pub mod bitmap;
pub mod ept;
pub mod memory_type;
pub mod vpid;
