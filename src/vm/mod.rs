//! vm: being built.
