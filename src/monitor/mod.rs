//! The operator's view: log, guests, console, statistics.

pub mod features;
pub mod guests;
pub mod log;
pub mod processors;
pub mod statistics;
