//! Does what no guest should, at random but the same for the same seed, and survives what it
//! gets for it as long as it can. Of its command line it takes:
//!
//! | word | what |
//! | --- | --- |
//! | `seed=N` | by which everything is chosen; left out, the clock and `salt=N` are one |
//! | `from=N` | the first round |
//! | `rounds=N` | how many |
//! | `trace=1` | tells every round, and what it executes |
//! | `then=0`, `then=1` | powers the machine off behind the last, or resets it |
//!
//! ```text
//! fuzz: seed N
//! fuzz: round N
//! fuzz: done
//! ```
//!
//! With two CPUs the second meddles, and has it go on where nothing else does.
//!
//! Each [`EVERY`]th round is told before it begins.
#![no_std]
#![no_main]

mod code;
mod machine;
mod modes;
mod random;
mod rounds;
mod warden;

use random::Random;
use vireo_test_guests::port::{in8, out8};
use vireo_test_guests::report::{power_off, say, stop};
use vireo_test_guests::start_info::option;
use vireo_test_guests::{exceptions, serial};

vireo_test_guests::guest!(run);

const EVERY: u64 = 256;

fn run() {
    let seed = option("seed").unwrap_or_else(clock);
    let first = option("from").unwrap_or(0);
    let rounds = option("rounds").unwrap_or(1000);
    let resets = option("then") == Some(1);
    let traced = option("trace") == Some(1);
    code::TRACED.set(traced);
    say(format_args!("fuzz: seed {seed}"));
    warden::start();
    machine::prepare();
    for round in first..first.saturating_add(rounds) {
        if traced || round % EVERY == 0 {
            say(format_args!("fuzz: round {round}"));
        }
        warden::ROUND.set(round);
        let mut random = Random::new(seed, round);
        // What is caught here has got around what the round itself catches.
        exceptions::catch(|| {
            let touched = rounds::round(&mut random);
            machine::restore_devices(if warden::has_meddled() {
                machine::Touched::ALL
            } else {
                touched
            });
        });
    }
    say(format_args!("fuzz: done"));
    if resets {
        serial::flush();
        const RESET_CONTROL: u16 = 0xcf9;
        out8(RESET_CONTROL, 6);
        stop()
    }
    power_off()
}

/// A seed that no other start has: the time of day.
fn clock() -> u64 {
    let time = [0u8, 2, 4, 7, 8, 9].into_iter().fold(0, |time, register| {
        out8(0x70, register);
        time << 8 | u64::from(in8(0x71))
    });
    Random::new(option("salt").unwrap_or(0), time).next() >> 32
}
