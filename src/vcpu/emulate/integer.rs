//! Integer instructions on registers and one operand in memory.

use super::alu::{self, Binary, CF, OF, PF, SF, Unary, ZF};
use super::bits::{self, BitTest, Field, Scan};
use super::multiply;
use super::operand::{Gpr, Memory, Place, sign_extend};
use super::shift::{self, Shift};
use super::{EmulateError, Intent, Machine, Result, Step};
use crate::devices::Width;
use crate::vcpu::fault::Exception;
use iced_x86::{ConditionCode, Mnemonic, OpKind};

/// Whether the condition of a Jcc, SETcc or CMOVcc holds.
fn holds(condition: ConditionCode, rflags: u64) -> bool {
    let set = |flags| rflags & flags != 0;
    let less = set(SF) != set(OF);
    match condition {
        ConditionCode::None => true,
        ConditionCode::o => set(OF),
        ConditionCode::no => !set(OF),
        ConditionCode::b => set(CF),
        ConditionCode::ae => !set(CF),
        ConditionCode::e => set(ZF),
        ConditionCode::ne => !set(ZF),
        ConditionCode::be => set(CF | ZF),
        ConditionCode::a => !set(CF | ZF),
        ConditionCode::s => set(SF),
        ConditionCode::ns => !set(SF),
        ConditionCode::p => set(PF),
        ConditionCode::np => !set(PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(ZF),
        ConditionCode::g => !less && !set(ZF),
    }
}

impl<M: Machine> Step<'_, '_, M> {
    /// Executes an instruction that is not one of the other modules'.
    pub(super) fn integer(&mut self) -> Result<()> {
        match self.instruction.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movnti | Mnemonic::Movdiri => {
                self.copy(|value, _| value)
            }
            Mnemonic::Movsx | Mnemonic::Movsxd => self.copy(sign_extend),
            Mnemonic::Movbe => {
                self.copy(|value, from| value.swap_bytes() >> (64 - 8 * from.bytes()))
            }
            Mnemonic::Xlatb => self.translate_byte(),
            Mnemonic::Xchg => self.exchange(),
            Mnemonic::Xadd => self.exchange_add(),
            Mnemonic::Cmpxchg => self.compare_exchange(),
            Mnemonic::Cmpxchg8b => self.compare_exchange_pair(Width::Dword),
            Mnemonic::Cmpxchg16b => self.compare_exchange_pair(Width::Qword),
            Mnemonic::Add => self.binary(Binary::Add),
            Mnemonic::Adc => self.binary(Binary::Adc),
            Mnemonic::Sub => self.binary(Binary::Sub),
            Mnemonic::Sbb => self.binary(Binary::Sbb),
            Mnemonic::And => self.binary(Binary::And),
            Mnemonic::Or => self.binary(Binary::Or),
            Mnemonic::Xor => self.binary(Binary::Xor),
            Mnemonic::Cmp => self.binary(Binary::Cmp),
            Mnemonic::Test => self.binary(Binary::Test),
            Mnemonic::Adcx => self.add_with(CF),
            Mnemonic::Adox => self.add_with(OF),
            Mnemonic::Inc => self.unary(Unary::Inc),
            Mnemonic::Dec => self.unary(Unary::Dec),
            Mnemonic::Neg => self.unary(Unary::Neg),
            Mnemonic::Not => self.unary(Unary::Not),
            Mnemonic::Rol => self.shift(Shift::Rol),
            Mnemonic::Ror => self.shift(Shift::Ror),
            Mnemonic::Rcl => self.shift(Shift::Rcl),
            Mnemonic::Rcr => self.shift(Shift::Rcr),
            Mnemonic::Shl | Mnemonic::Sal => self.shift(Shift::Shl),
            Mnemonic::Shr => self.shift(Shift::Shr),
            Mnemonic::Sar => self.shift(Shift::Sar),
            Mnemonic::Shld => self.double_shift(false),
            Mnemonic::Shrd => self.double_shift(true),
            Mnemonic::Rorx => self.shift_to(Shift::Ror),
            Mnemonic::Shlx => self.shift_to(Shift::Shl),
            Mnemonic::Shrx => self.shift_to(Shift::Shr),
            Mnemonic::Sarx => self.shift_to(Shift::Sar),
            Mnemonic::Bt => self.bit_test(BitTest::Bt),
            Mnemonic::Bts => self.bit_test(BitTest::Bts),
            Mnemonic::Btr => self.bit_test(BitTest::Btr),
            Mnemonic::Btc => self.bit_test(BitTest::Btc),
            Mnemonic::Bsf => self.scan(Scan::Bsf),
            Mnemonic::Bsr => self.scan(Scan::Bsr),
            Mnemonic::Tzcnt => self.scan(Scan::Tzcnt),
            Mnemonic::Lzcnt => self.scan(Scan::Lzcnt),
            Mnemonic::Popcnt => self.scan(Scan::Popcnt),
            Mnemonic::Andn => self.and_not(),
            Mnemonic::Bextr => self.field(Field::Bextr),
            Mnemonic::Blsi => self.field(Field::Blsi),
            Mnemonic::Blsmsk => self.field(Field::Blsmsk),
            Mnemonic::Blsr => self.field(Field::Blsr),
            Mnemonic::Bzhi => self.field(Field::Bzhi),
            Mnemonic::Pdep => self.field(Field::Pdep),
            Mnemonic::Pext => self.field(Field::Pext),
            Mnemonic::Crc32 => self.crc32(),
            Mnemonic::Mul => self.multiply(multiply::unsigned),
            Mnemonic::Imul if self.instruction.op_count() == 1 => self.multiply(multiply::signed),
            Mnemonic::Imul => self.multiply_to(),
            Mnemonic::Mulx => self.multiply_to_both(),
            Mnemonic::Div => self.divide(false),
            Mnemonic::Idiv => self.divide(true),
            Mnemonic::Bound => self.bound(),
            Mnemonic::Arpl => self.adjust_privilege(),
            // Only hints, or about caches, which are the host's.
            Mnemonic::Nop
            | Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb
            | Mnemonic::Cldemote
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1 => Ok(()),
            _ => self.conditional(),
        }
    }

    /// CMOVcc, which reads its operand in any case, and SETcc.
    fn conditional(&mut self) -> Result<()> {
        let condition = self.instruction.condition_code();
        let holds = holds(condition, self.registers.rflags);
        match (condition, self.instruction.op_count()) {
            (ConditionCode::None, _) => Err(EmulateError::Unsupported),
            (_, 2) => {
                let (to, from) = self.places()?;
                let (old, new) = (self.read(to)?, self.read(from)?);
                self.write(to, if holds { new } else { old })
            }
            // The others are jumps.
            (_, 1)
                if matches!(
                    self.instruction.op0_kind(),
                    OpKind::Register | OpKind::Memory
                ) =>
            {
                let to = self.place(0)?;
                self.write(to, holds.into())
            }
            _ => Err(EmulateError::Unsupported),
        }
    }

    fn places(&self) -> Result<(Place, Place)> {
        Ok((self.place(0)?, self.place(1)?))
    }

    /// The second operand to the first, through `change`, which is told the second's width.
    fn copy(&mut self, change: impl Fn(u64, Width) -> u64) -> Result<()> {
        let (to, from) = self.places()?;
        let value = self.read(from)?;
        let value = change(value, Self::width(from, to));
        self.write(to, value)
    }

    fn translate_byte(&mut self) -> Result<()> {
        let memory = self.memory(Width::Byte)?;
        let value = self.read(Place::Memory(memory))?;
        self.set(Gpr::low(Gpr::RAX, Width::Byte), value);
        Ok(())
    }

    fn exchange(&mut self) -> Result<()> {
        let (first, second) = self.places()?;
        let (a, b) = (self.read_for(first, Intent::Modify)?, self.read(second)?);
        self.write(first, b)?;
        self.write(second, a)
    }

    fn exchange_add(&mut self) -> Result<()> {
        let (to, from) = self.places()?;
        let (a, b) = (self.read_for(to, Intent::Modify)?, self.read(from)?);
        let width = Self::width(to, from);
        let (sum, flags) = Binary::Add.compute(a, b, width, self.registers.rflags);
        match to {
            // The sum is what stays where both are one register.
            Place::Register(_) => {
                self.write(from, a)?;
                self.write(to, sum)?;
            }
            _ => {
                self.write(to, sum)?;
                self.write(from, a)?;
            }
        }
        self.registers.rflags = flags;
        Ok(())
    }

    fn compare_exchange(&mut self) -> Result<()> {
        let (to, from) = self.places()?;
        let width = Self::width(to, from);
        let accumulator = Gpr::low(Gpr::RAX, width);
        let (old, expected) = (self.read_for(to, Intent::Modify)?, self.get(accumulator));
        let new = self.read(from)?;
        let (_, flags) = Binary::Cmp.compute(expected, old, width, self.registers.rflags);
        if old == expected {
            self.write(to, new)?;
        } else {
            // What was there is written back.
            self.write(to, old)?;
            self.set(accumulator, old);
        }
        self.registers.rflags = flags;
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B: two halves that are `half` wide.
    fn compare_exchange_pair(&mut self, half: Width) -> Result<()> {
        let (segment, offset) = self.address()?;
        let size = half.bytes() as usize;
        let linear = self.linear(segment, offset, 2 * half.bytes(), true)?;
        if half == Width::Qword && linear & 15 != 0 {
            return Err(Exception::GeneralProtection.into());
        }
        let mut bytes = [0; 16];
        let part = bytes.get_mut(..2 * size).unwrap_or_default();
        self.machine.load(linear, part, Intent::Modify)?;
        let old = u128::from_le_bytes(bytes);
        let bits = 8 * half.bytes() as u32;
        let gpr = |index| Gpr::low(index, half);
        let pair = |step: &Self, high, low| {
            u128::from(step.get(gpr(high))) << bits | u128::from(step.get(gpr(low)))
        };
        let equal = old == pair(self, Gpr::RDX, Gpr::RAX);
        let new = if equal {
            pair(self, Gpr::RCX, Gpr::RBX)
        } else {
            old
        };
        let bytes = new.to_le_bytes();
        self.machine
            .store(linear, bytes.get(..2 * size).unwrap_or_default())?;
        let flags = &mut self.registers.rflags;
        *flags = if equal { *flags | ZF } else { *flags & !ZF };
        if !equal {
            self.set(gpr(Gpr::RAX), old as u64);
            self.set(gpr(Gpr::RDX), (old >> bits) as u64);
        }
        Ok(())
    }

    fn binary(&mut self, operation: Binary) -> Result<()> {
        let (to, from) = self.places()?;
        let width = Self::width(to, from);
        let intent = if operation.stores() {
            Intent::Modify
        } else {
            Intent::Read
        };
        let (a, b) = (self.read_for(to, intent)?, self.read(from)?);
        let (value, flags) = operation.compute(a, b, width, self.registers.rflags);
        if operation.stores() {
            self.write(to, value)?;
        }
        self.registers.rflags = flags;
        Ok(())
    }

    /// ADCX and ADOX: an addition with `carry`, and no other flag.
    fn add_with(&mut self, carry: u64) -> Result<()> {
        let (to, from) = self.places()?;
        let width = Self::width(to, from);
        let (a, b) = (self.read(to)?, self.read(from)?);
        let flags = self.registers.rflags;
        let carry_in = if flags & carry != 0 { CF } else { 0 };
        let (value, status) = Binary::Adc.compute(a, b, width, carry_in);
        self.write(to, value)?;
        let carry_out = if status & CF != 0 { carry } else { 0 };
        self.registers.rflags = flags & !carry | carry_out;
        Ok(())
    }

    fn unary(&mut self, operation: Unary) -> Result<()> {
        let place = self.place(0)?;
        let value = self.read_for(place, Intent::Modify)?;
        let width = Self::width(place, place);
        let (value, flags) = operation.compute(value, width, self.registers.rflags);
        self.write(place, value)?;
        self.registers.rflags = flags;
        Ok(())
    }

    fn shift(&mut self, shift: Shift) -> Result<()> {
        let (to, count) = self.places()?;
        let (value, count) = (self.read_for(to, Intent::Modify)?, self.read(count)?);
        let width = Self::width(to, to);
        let (value, flags) = shift.compute(value, count, width, self.registers.rflags);
        self.write(to, value)?;
        self.registers.rflags = flags;
        Ok(())
    }

    /// SHLX and others: to another register, without flags.
    fn shift_to(&mut self, shift: Shift) -> Result<()> {
        let (to, from) = self.places()?;
        let count = self.place(2)?;
        let (value, count) = (self.read(from)?, self.read(count)?);
        let (value, _) = shift.compute(value, count, Self::width(to, from), 0);
        self.write(to, value)
    }

    fn double_shift(&mut self, right: bool) -> Result<()> {
        let (to, from) = self.places()?;
        let count = self.place(2)?;
        let (a, b) = (self.read_for(to, Intent::Modify)?, self.read(from)?);
        let count = self.read(count)?;
        let width = Self::width(to, from);
        let (value, flags) = shift::double(a, b, count, right, width, self.registers.rflags);
        self.write(to, value)?;
        self.registers.rflags = flags;
        Ok(())
    }

    /// A register's bit offset reaches beyond the operand, forward and backward.
    fn bit_test(&mut self, test: BitTest) -> Result<()> {
        let (base, offset) = self.places()?;
        let width = Self::width(base, offset);
        let bits = 8 * width.bytes();
        let number = self.read(offset)?;
        let place = match (base, offset) {
            (Place::Memory(memory), Place::Register(_)) => {
                let words = sign_extend(number, width) as i64 >> bits.trailing_zeros();
                let bytes = (words as u64).wrapping_mul(width.bytes());
                Place::Memory(self.displaced(memory, bytes)?)
            }
            _ => base,
        };
        let intent = if test.stores() {
            Intent::Modify
        } else {
            Intent::Read
        };
        let value = self.read_for(place, intent)?;
        let bit = (number & (bits - 1)) as u32;
        let (value, flags) = test.compute(value, bit, self.registers.rflags);
        if test.stores() {
            self.write(place, value)?;
        }
        self.registers.rflags = flags;
        Ok(())
    }

    fn scan(&mut self, scan: Scan) -> Result<()> {
        let (to, from) = self.places()?;
        let value = self.read(from)?;
        let width = Self::width(from, to);
        let (result, flags) = scan.compute(value, width, self.registers.rflags);
        if let Some(result) = result {
            self.write(to, result)?;
        }
        self.registers.rflags = flags;
        Ok(())
    }

    fn and_not(&mut self) -> Result<()> {
        let (to, inverted) = self.places()?;
        let other = self.place(2)?;
        let value = !self.read(inverted)? & self.read(other)?;
        let (value, status) = alu::logic(value, Self::width(to, other));
        self.write(to, value)?;
        let changed = CF | OF | SF | ZF;
        let flags = &mut self.registers.rflags;
        *flags = *flags & !changed | status & changed;
        Ok(())
    }

    /// With two operands, or three of which the last but one or the last is in memory.
    fn field(&mut self, field: Field) -> Result<()> {
        let (to, second) = self.places()?;
        let width = Self::width(to, second);
        let (value, control) = if self.instruction.op_count() < 3 {
            (second, None)
        } else if matches!(field, Field::Pdep | Field::Pext) {
            (self.place(2)?, Some(second))
        } else {
            (second, Some(self.place(2)?))
        };
        let control = match control {
            Some(place) => self.read(place)?,
            None => 0,
        };
        let value = self.read(value)?;
        let (value, flags) = field.compute(value, control, width, self.registers.rflags);
        self.write(to, value)?;
        self.registers.rflags = flags;
        Ok(())
    }

    fn crc32(&mut self) -> Result<()> {
        let (to, from) = self.places()?;
        let (crc, data) = (self.read(to)?, self.read(from)?);
        let crc = bits::crc32(crc as u32, data, Self::width(from, to));
        self.write(to, crc.into())
    }

    /// One operand: the accumulator's product goes to the accumulator and RDX; with bytes, to AX.
    fn multiply(&mut self, product: multiply::Product) -> Result<()> {
        let place = self.place(0)?;
        let width = Self::width(place, place);
        let factor = self.read(place)?;
        let accumulator = self.get(Gpr::low(Gpr::RAX, width));
        let (product, flags) = product(accumulator, factor, width, self.registers.rflags);
        self.set_pair(product, width);
        self.registers.rflags = flags;
        Ok(())
    }

    /// Where a byte's are AL and AH, those of others are RAX and RDX.
    fn high_half(width: Width) -> Gpr {
        match width {
            Width::Byte => Gpr {
                high: true,
                ..Gpr::low(Gpr::RAX, width)
            },
            _ => Gpr::low(Gpr::RDX, width),
        }
    }

    fn set_pair(&mut self, (low, high): (u64, u64), width: Width) {
        self.set(Gpr::low(Gpr::RAX, width), low);
        self.set(Self::high_half(width), high);
    }

    fn multiply_to(&mut self) -> Result<()> {
        let (to, second) = self.places()?;
        let third = if self.instruction.op_count() == 3 {
            self.place(2)?
        } else {
            to
        };
        let (a, b) = (self.read(second)?, self.read(third)?);
        let width = Self::width(to, second);
        let ((low, _), flags) = multiply::signed(a, b, width, self.registers.rflags);
        self.write(to, low)?;
        self.registers.rflags = flags;
        Ok(())
    }

    /// MULX: of RDX, to two registers, without flags.
    fn multiply_to_both(&mut self) -> Result<()> {
        let (high, low) = self.places()?;
        let factor = self.place(2)?;
        let width = Self::width(low, factor);
        let a = self.get(Gpr::low(Gpr::RDX, width));
        let b = self.read(factor)?;
        let ((lower, upper), _) = multiply::unsigned(a, b, width, 0);
        self.write(low, lower)?;
        // Where both are one register the upper half stays.
        self.write(high, upper)
    }

    fn divide(&mut self, is_signed: bool) -> Result<()> {
        let place = self.place(0)?;
        let width = Self::width(place, place);
        let divisor = self.read(place)?;
        let low = self.get(Gpr::low(Gpr::RAX, width));
        let high = self.get(Self::high_half(width));
        let result = multiply::divide((low, high), divisor, is_signed, width)?;
        self.set_pair(result, width);
        Ok(())
    }

    /// BOUND: an index between two bounds in memory.
    fn bound(&mut self) -> Result<()> {
        let Place::Register(gpr) = self.place(0)? else {
            return Err(EmulateError::Unsupported);
        };
        let width = gpr.width;
        let lower = self.memory(width)?;
        let upper = self.displaced(lower, width.bytes())?;
        let signed = |value| sign_extend(value, width) as i64;
        let lower = signed(self.read(Place::Memory(lower))?);
        let upper = signed(self.read(Place::Memory(upper))?);
        let index = signed(self.get(gpr));
        if index < lower || index > upper {
            return Err(Exception::BoundRange.into());
        }
        Ok(())
    }

    /// The operand `bytes` further up, in the width of the address.
    pub(super) fn displaced(&self, memory: Memory, bytes: u64) -> Result<Memory> {
        let offset = memory.offset.wrapping_add(bytes);
        let mask = super::operand::address_width(self.instruction)?.mask();
        Ok(Memory {
            offset: offset & mask,
            ..memory
        })
    }

    /// ARPL.
    fn adjust_privilege(&mut self) -> Result<()> {
        if self.machine.addressing().has_paragraphs() {
            return Err(Exception::InvalidOpcode.into());
        }
        let (to, from) = self.places()?;
        let (a, b) = (self.read_for(to, Intent::Modify)?, self.read(from)?);
        let adjusted = a & 3 < b & 3;
        let flags = self.registers.rflags;
        if adjusted {
            self.write(to, a & !3 | b & 3)?;
        }
        self.registers.rflags = if adjusted { flags | ZF } else { flags & !ZF };
        Ok(())
    }
}
