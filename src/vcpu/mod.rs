//! vcpu: being built.
