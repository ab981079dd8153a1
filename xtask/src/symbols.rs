//! Turns the addresses of a hypervisor backtrace into functions and lines.

use anyhow::{Result, anyhow};
use std::path::Path;

/// What each line of a backtrace, `vireo:   at 0xffffffff80012345`, means. One
/// line of text for each function, so an inlined one has its own. Lines of
/// another form are left out.
///
/// # Errors
/// When `kernel` cannot be read as an ELF file with line tables.
pub fn backtrace(kernel: &Path, lines: &[String]) -> Result<Vec<String>> {
    let loader = addr2line::Loader::new(kernel)
        .map_err(|error| anyhow!("cannot read the symbols of {}: {error}", kernel.display()))?;
    Ok(lines
        .iter()
        .filter_map(|line| address(line))
        .flat_map(|address| describe(&loader, address))
        .collect())
}

/// The address in a line of a backtrace.
fn address(line: &str) -> Option<u64> {
    let text = line
        .trim()
        .strip_prefix("vireo:")?
        .trim()
        .strip_prefix("at ")?;
    let digits = text.split_whitespace().next()?.strip_prefix("0x")?;
    u64::from_str_radix(&digits.replace('_', ""), 16).ok()
}

fn describe(loader: &addr2line::Loader, address: u64) -> Vec<String> {
    // A return address may lie behind its function's end: a call to a function
    // that never returns is the last instruction. The call is before it.
    let call = address.saturating_sub(1);
    let mut lines = Vec::new();
    if let Ok(mut frames) = loader.find_frames(call) {
        while let Ok(Some(frame)) = frames.next() {
            let name = frame
                .function
                .as_ref()
                .and_then(|function| function.demangle().ok());
            let place = frame.location.map(|location| {
                format!(
                    " ({}:{})",
                    location.file.unwrap_or("?"),
                    location.line.unwrap_or(0)
                )
            });
            if let Some(name) = name {
                lines.push(format!("{address:#x} {name}{}", place.unwrap_or_default()));
            }
        }
    }
    if lines.is_empty() {
        let name = loader.find_symbol(call).map_or("?".into(), |name| {
            addr2line::demangle_auto(name.into(), None)
        });
        lines.push(format!("{address:#x} {name}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_backtrace_lines_only() {
        assert_eq!(
            address("vireo:   at 0xffffffff80012345"),
            Some(0xffff_ffff_8001_2345)
        );
        assert_eq!(address("vireo:   at 0x10 in somewhere"), Some(0x10));
        assert_eq!(address("vireo:   rip 0x10"), None);
        assert_eq!(address("  at 0x10"), None);
    }

    #[test]
    fn a_function_of_this_program_is_found_by_its_address() {
        let own = std::env::current_exe().unwrap();
        let file = std::fs::read(&own).unwrap();
        let object = object::File::parse(&*file).unwrap();
        use object::{Object, ObjectSymbol};
        let symbol = object
            .symbols()
            .find(|symbol| {
                symbol
                    .name()
                    .is_ok_and(|name| name.contains("symbols") && name.contains("describe"))
            })
            .unwrap();
        let line = format!("vireo:   at {:#x}", symbol.address() + 2);
        let text = backtrace(&own, &[line]).unwrap().join("\n");
        assert!(
            text.contains("xtask::symbols::describe") && text.contains("symbols.rs:"),
            "{text}"
        );
    }
}
