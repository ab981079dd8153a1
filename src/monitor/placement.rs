//! Which vCPU runs on which CPU, for as long as the machine runs.
//!
//! A guest's `cpus` are its own. What is left of the machine's CPUs is shared by the other
//! guests: each of their vCPUs goes where the fewest are.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use vireo_handoff::config;

/// Why a guest has no place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// The configuration names this CPU, and the machine has those.
    NoSuchCpu { named: u32, there: Vec<usize> },
    /// All CPUs belong to other guests.
    NoneShared,
}

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchCpu { named, there } => {
                write!(
                    f,
                    "`cpus` in vireo.toml names CPU {named}, and the machine has these:"
                )?;
                there.iter().try_for_each(|cpu| write!(f, " {cpu}"))
            }
            Self::NoneShared => f.write_str(
                "it shares CPUs with others, and all CPUs of the machine are named in some `cpus` in vireo.toml; leave one out",
            ),
        }
    }
}

/// The CPUs of each guest's vCPUs, by their numbers; `there` are the machine's.
pub fn place(guests: &[config::Vm], there: &[usize]) -> Vec<Result<Vec<usize>, NoPlace>> {
    let is_owned = |cpu: &usize| {
        let mut owned = guests.iter().flat_map(|guest| &guest.cpus);
        owned.any(|own| *own as usize == *cpu)
    };
    let mut shared: BTreeMap<usize, usize> = there
        .iter()
        .filter(|cpu| !is_owned(cpu))
        .map(|cpu| (*cpu, 0))
        .collect();
    guests
        .iter()
        .map(|guest| {
            if let Some(&named) = guest
                .cpus
                .iter()
                .find(|cpu| !there.contains(&(**cpu as usize)))
            {
                let there = there.to_vec();
                return Err(NoPlace::NoSuchCpu { named, there });
            }
            if !guest.cpus.is_empty() {
                return Ok(guest.cpus.iter().map(|cpu| *cpu as usize).collect());
            }
            (0..guest.vcpus)
                .map(|_| {
                    let least = shared.iter_mut().min_by_key(|(_, vcpus)| **vcpus);
                    let (cpu, vcpus) = least.ok_or(NoPlace::NoneShared)?;
                    *vcpus += 1;
                    Ok(*cpu)
                })
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vireo_handoff::config::Config;

    fn places(guests: &[(u32, &str)], there: &[usize]) -> Vec<Result<Vec<usize>, NoPlace>> {
        let sections = guests.iter().zip('a'..).map(|((vcpus, cpus), name)| {
            std::format!("[[vm]]\nname = \"{name}\"\nmemory = \"2M\"\nkernel = \"k\"\nvcpus = {vcpus}\n{cpus}\n")
        });
        let text: std::string::String = sections.collect();
        let config = Config::parse("vireo.toml", &text).expect("it is right");
        place(&config.vm, there)
    }

    #[test]
    fn what_is_nobodys_is_shared_evenly() {
        let guests = [(2, ""), (2, "cpus = [1, 3]"), (1, "cpus = \"shared\"")];
        assert_eq!(
            places(&guests, &[0, 1, 2, 3]),
            [Ok([0, 2].into()), Ok([1, 3].into()), Ok([0].into())]
        );
        assert_eq!(places(&[(3, "")], &[0]), [Ok([0, 0, 0].into())]);
    }

    #[test]
    fn a_cpu_that_is_not_there_is_named() {
        let there = [0, 2];
        let no_such = NoPlace::NoSuchCpu {
            named: 1,
            there: there.to_vec(),
        };
        assert_eq!(
            no_such.to_string(),
            "`cpus` in vireo.toml names CPU 1, and the machine has these: 0 2"
        );
        assert_eq!(places(&[(1, "cpus = [1]")], &there), [Err(no_such)]);
        assert_eq!(
            places(&[(1, "cpus = [0]"), (1, "")], &[0]),
            [Ok([0].into()), Err(NoPlace::NoneShared)]
        );
    }
}
