//! Arithmetic on a register or an immediate and a device: what accesses to devices are that are
//! no plain moves, mostly, worked out when the instruction is decoded.

use super::alu::{Binary, Unary};
use super::moves::Alignment;
use super::operand::Gpr;
use crate::arch::registers::GeneralRegisters;
use crate::devices::Width;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// ADD, OR and others with a general register other than RSP or an immediate, INC and others, and
/// XCHG, where one register tells whether the address is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    operation: Operation,
    /// Bytes that the device is accessed with.
    pub width: Width,
    /// The instruction's length.
    pub length: u8,
    /// It is to be atomic.
    pub locked: bool,
    /// The device is written.
    pub stores: bool,
    /// The device is the first operand.
    device_first: bool,
    /// The other one, where it is no immediate.
    register: Option<Gpr>,
    immediate: u64,
    pub alignment: Alignment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Binary(Binary),
    Unary(Unary),
    /// XCHG.
    Exchange,
}

impl Operation {
    fn of(mnemonic: Mnemonic) -> Option<Self> {
        Some(match mnemonic {
            Mnemonic::Add => Self::Binary(Binary::Add),
            Mnemonic::Adc => Self::Binary(Binary::Adc),
            Mnemonic::Sub => Self::Binary(Binary::Sub),
            Mnemonic::Sbb => Self::Binary(Binary::Sbb),
            Mnemonic::And => Self::Binary(Binary::And),
            Mnemonic::Or => Self::Binary(Binary::Or),
            Mnemonic::Xor => Self::Binary(Binary::Xor),
            Mnemonic::Cmp => Self::Binary(Binary::Cmp),
            Mnemonic::Test => Self::Binary(Binary::Test),
            Mnemonic::Inc => Self::Unary(Unary::Inc),
            Mnemonic::Dec => Self::Unary(Unary::Dec),
            Mnemonic::Neg => Self::Unary(Unary::Neg),
            Mnemonic::Not => Self::Unary(Unary::Not),
            Mnemonic::Xchg => Self::Exchange,
            _ => return None,
        })
    }

    fn stores(self) -> bool {
        match self {
            Self::Binary(operation) => operation.stores(),
            Self::Unary(_) | Self::Exchange => true,
        }
    }
}

/// What follows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    /// What is written to the device.
    pub stored: Option<u64>,
    pub rflags: u64,
}

impl Arithmetic {
    /// The arithmetic that `instruction` is, if it is one.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        let operation = Operation::of(instruction.mnemonic())?;
        let device_first = instruction.op0_kind() == OpKind::Memory;
        let device_second = instruction.op1_kind() == OpKind::Memory;
        if device_first == device_second {
            return None;
        }
        let width = Width::from_bytes(instruction.memory_size().size() as u64)?;
        let other = u32::from(device_first);
        let (register, immediate) = if instruction.op_count() == 1 {
            (None, 0)
        } else if instruction.op_kind(other) == OpKind::Register {
            (Some(Gpr::new(instruction.op_register(other))?), 0)
        } else {
            (None, instruction.try_immediate(other).ok()?)
        };
        if register.is_some_and(|gpr| gpr.index == Gpr::RSP) {
            return None;
        }
        let alignment = Alignment::of(instruction, width)?;
        Some(Self {
            operation,
            width,
            length: instruction.len() as u8,
            stores: device_first && operation.stores(),
            locked: instruction.has_lock_prefix() || operation == Operation::Exchange,
            device_first,
            register,
            immediate,
            alignment,
        })
    }

    /// Computes it with what was read from the device; a result that is a register's is there
    /// then.
    pub fn compute(&self, registers: &mut GeneralRegisters, device: u64, rflags: u64) -> Computed {
        let other = self
            .register
            .map_or(self.immediate, |gpr| gpr.get(registers));
        let operation = match self.operation {
            Operation::Binary(operation) => operation,
            Operation::Unary(operation) => {
                let (value, rflags) = operation.compute(device, self.width, rflags);
                let stored = Some(value);
                return Computed { stored, rflags };
            }
            Operation::Exchange => {
                if let Some(gpr) = self.register {
                    gpr.set(registers, device);
                }
                let stored = Some(other);
                return Computed { stored, rflags };
            }
        };
        let (a, b) = if self.device_first {
            (device, other)
        } else {
            (other, device)
        };
        let (value, rflags) = operation.compute(a, b, self.width, rflags);
        match self.register {
            Some(gpr) if !self.device_first && operation.stores() => gpr.set(registers, value),
            _ => {}
        }
        Computed {
            stored: self.stores.then_some(value),
            rflags,
        }
    }
}
