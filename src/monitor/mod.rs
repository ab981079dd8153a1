//! The operator's view: log, guests, console, statistics.

pub mod console;
pub mod features;
pub mod guests;
pub mod log;
pub mod placement;
pub mod processors;
pub mod registry;
pub mod scheduler;
pub mod statistics;
