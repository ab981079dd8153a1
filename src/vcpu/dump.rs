//! A vCPU's state as text, for the operator. It is made on the vCPU's own CPU, where alone its VMCS
//! can be read.

use super::Vcpu;
use crate::arch::cpu;
use crate::arch::registers::GeneralRegisters;
use crate::vmx::vmcs;
use alloc::string::String;
use core::fmt::Write;

/// In the order of their encodings. RSP is in the VMCS.
const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

impl Vcpu {
    /// The general registers, and all fields of the VMCS that are used, in lines of less than 80
    /// characters.
    pub(super) fn dump(&self, registers: &GeneralRegisters) -> String {
        let mut table = Table::default();
        for (name, index) in REGISTERS.iter().zip(0..) {
            if *name != "rsp" {
                table.add(name, registers.get(index));
            }
        }
        // The guest's, as long as no other runs here.
        table.add("cr2", cpu::cr2());
        let mut before = "";
        for (area, name, encoding) in vmcs::fields() {
            if area != before {
                table.heading(area);
                before = area;
            }
            table.add(name, self.vmcs.read_raw(encoding));
        }
        table.end_line();
        table.text
    }
}

/// The most bytes of a name in a column.
const NAME: usize = 21;

/// Two columns, or one where a name is too long.
#[derive(Default)]
struct Table {
    text: String,
    within_line: bool,
}

impl Table {
    fn add(&mut self, name: &str, value: u64) {
        let alone = name.len() > NAME;
        if alone {
            self.end_line();
        }
        // Text takes everything.
        let _ = write!(self.text, "{name:NAME$} {value:16x}");
        if self.within_line || alone {
            self.text.push('\n');
            self.within_line = false;
        } else {
            self.text.push_str("   ");
            self.within_line = true;
        }
    }

    fn heading(&mut self, area: &str) {
        self.end_line();
        let _ = writeln!(self.text, "VMCS, {area}:");
    }

    fn end_line(&mut self) {
        if self.within_line {
            self.text.push('\n');
            self.within_line = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_short_and_names_apart_from_values() {
        let mut table = Table::default();
        for (area, name, encoding) in vmcs::fields() {
            table.heading(area);
            table.add(name, u64::from(encoding));
            table.add("rax", u64::MAX);
        }
        for line in table.text.lines() {
            assert!(line.len() < 80, "{line}");
        }
        let rip = vmcs::fields().find(|field| field.1 == "RIP").unwrap();
        assert_eq!(rip, ("guest", "RIP", 0x681e));
        assert!(
            table
                .text
                .contains("EXIT_REASON                       4402   rax ")
        );
    }
}
