//! arch: being built.
