//! vmx: being built.
