//! Small guests that the integration tests boot.
#![no_std]
