//! The operator's view: log, console, statistics.

pub mod log;
