//! The integration tests: each boots a machine as a user would, by
//! `cargo xtask run`, and looks at the exit status, both output streams and
//! everything that was said on the serial console.
//!
//! `cargo xtask test [FILTER]` runs them after the unit tests. A test's name
//! is `MODULE::TEST`; FILTER selects those whose name contains it. Tests of
//! the module `nested` take minutes each and run only where FILTER names them.

#![forbid(unsafe_code)]

mod console;
mod deaths;
mod fetching;
mod figures;
mod guests;
mod harness;
mod images;
mod isolation;
mod linux;
mod nested;
mod protocols;
mod refusals;
mod unusable;

use harness::Suite;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut suite = Suite::default();
    console::add(&mut suite);
    deaths::add(&mut suite);
    fetching::add(&mut suite);
    figures::add(&mut suite);
    guests::add(&mut suite);
    isolation::add(&mut suite);
    linux::add(&mut suite);
    nested::add(&mut suite);
    protocols::add(&mut suite);
    refusals::add(&mut suite);
    unusable::add(&mut suite);
    match suite.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
