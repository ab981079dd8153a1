//! The interrupt command register (SDM 3, 12.6.1 and 12.12.9).

use super::registers::LEAST_VECTOR;
use crate::devices::{DeliveryMode, Destination, Message, Trigger};

const LOGICAL: u32 = 1 << 11;
const DELIVERY_STATUS: u32 = 1 << 12;
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const SHORTHAND_SHIFT: u32 = 18;
const SHORTHAND: u32 = 3 << SHORTHAND_SHIFT;
const SELF: u32 = 1 << SHORTHAND_SHIFT;
const MODE: u32 = 7 << 8;

/// What software can write to the low half. The delivery status is always idle.
pub const WRITABLE: u32 = 0xff | MODE | LOGICAL | ASSERT | LEVEL | SHORTHAND;

/// Bits that fault when they are set in x2APIC mode. The delivery status, which
/// that mode does not have, is ignored: software writes back what it has read
/// in the other mode.
pub const X2APIC_RESERVED: u64 = !(0xffff_ffff << 32 | (WRITABLE | DELIVERY_STATUS) as u64);

/// Whether the low half asks for a fixed interrupt to the sender, by the
/// shorthand: the commonest command of a kernel that runs on one CPU, so it is
/// told without decoding the rest.
#[inline]
pub const fn is_fixed_to_itself(low: u32) -> bool {
    low & (MODE | SHORTHAND) == SELF
}

/// Whether it asks for a fixed interrupt to the APIC whose identifier is the destination.
#[inline]
pub const fn is_fixed_to(low: u32) -> bool {
    low & (MODE | SHORTHAND | LOGICAL) == 0
}

/// What a write to the ICR asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Send(Message),
    /// A fixed or lowest-priority interrupt with a vector below 16: not sent.
    IllegalVector,
    /// A reserved delivery mode, or a combination that the SDM calls invalid
    /// and that would reset or start the sender (tables 12-3 and 12-4): not sent.
    Invalid,
}

impl Command {
    /// Decodes the low half, with the destination field `destination`, whose
    /// value `broadcast` (all ones, in the width of the mode) means everyone.
    #[inline]
    pub fn decode(low: u32, destination: u32, broadcast: u32) -> Self {
        let Some(mode) = DeliveryMode::from_bits(low >> 8) else {
            return Self::Invalid;
        };
        let vector = low as u8;
        let shorthand = low >> SHORTHAND_SHIFT & 3;
        let destination = match shorthand {
            0 if destination == broadcast && low & LOGICAL == 0 => Destination::All,
            0 if low & LOGICAL != 0 => Destination::Logical(destination),
            0 => Destination::Physical(destination),
            1 => Destination::Itself,
            2 => Destination::All,
            _ => Destination::Others,
        };
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < LEAST_VECTOR => {
                return Self::IllegalVector;
            }
            DeliveryMode::ExtInt => return Self::Invalid,
            DeliveryMode::Init | DeliveryMode::StartUp if matches!(shorthand, 1 | 2) => {
                return Self::Invalid;
            }
            _ => {}
        }
        // Trigger mode and level mean something for INIT only; everything else is
        // an edge (SDM 3, 12.6.1, "Level" and "Trigger Mode").
        let deassert = mode == DeliveryMode::Init && low & LEVEL != 0 && low & ASSERT == 0;
        Self::Send(Message {
            mode,
            destination,
            vector,
            trigger: if deassert {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            assert: !deassert,
        })
    }
}
