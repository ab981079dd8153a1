//! The architecture of VT-x, and nothing else: no device, no guest policy.
//!
//! [`operation`] switches VMX on with the [`controls`] that the
//! [`capability`] MSRs allow; a [`vmcs`] is built from typed fields; [`entry`]
//! is the way into the guest and back; [`mod@exit`] decodes why it came back, [`exit_times`] how long that took, [`trace`] which were the last.
//! [`ept`], [`vpid`], [`bitmap`] and [`memory_type`] are the tables that the
//! hardware reads, [`apic`] is what it does of a local APIC; [`live_state`] is what it never switches; [`check`] and [`error`] say what was wrong when it refuses.

pub mod apic;
pub mod bitmap;
pub mod capability;
pub mod check;
pub mod controls;
#[cfg(feature = "count-vmcs")]
pub mod count;
pub mod entry;
pub mod ept;
pub mod ept_frames;
pub mod error;
pub mod exit;
pub mod exit_reason;
pub mod exit_times;
pub mod host_state;
pub mod live_state;
pub mod memory_type;
pub mod operation;
pub mod trace;
pub mod vmcs;
pub mod vpid;
