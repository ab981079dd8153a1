use super::*;
use crate::addr::Hpa;
use crate::vcpu::emulate::{Decoded, Mode};
use crate::vm::slots::{Slot, SlotKind, Slots};
use proptest::prelude::*;

/// mov [rax], ecx
const CODE: [u8; 2] = [0x89, 0x08];
const CR3: u64 = 0x1000;
/// Where the tables of the four levels are, and the code.
const TABLES: [u64; ENTRIES] = [CR3, 0x2000, 0x3000, 0x4000];
const PAGE: u64 = 0x5000;
const KERNEL: u32 = 0xa09b;
const USER: u32 = 0xa0fb;

/// A guest whose code is at every linear address that ends in the same 12 bits.
struct Guest {
    memory: GuestMemory,
    _backing: Vec<u64>,
}

impl Guest {
    fn new(rip: u64, flags: [u64; ENTRIES]) -> Self {
        let mut backing = vec![0u64; 0x6000 / 8 + 512];
        let aligned = (backing.as_mut_ptr() as u64).next_multiple_of(4096);
        let slot = Slot {
            start: Gpa(0),
            len: 0x6000,
            backing: Hpa(aligned),
            kind: SlotKind::Ram,
        };
        let guest = Self {
            memory: GuestMemory::new(Slots::new(vec![slot]).unwrap(), 0),
            _backing: backing,
        };
        let next = TABLES.into_iter().skip(1).chain([PAGE]);
        for ((at, next), flags) in guest.entries(rip).into_iter().zip(next).zip(flags) {
            guest
                .memory
                .write(at, &(next | flags).to_le_bytes())
                .unwrap();
        }
        guest.memory.write(guest.code(rip), &CODE).unwrap();
        guest
    }

    fn entries(&self, rip: u64) -> [Gpa; ENTRIES] {
        let shifts = [39, 30, 21, 12];
        core::array::from_fn(|level| Gpa(TABLES[level] + (rip >> shifts[level] & 0x1ff) * 8))
    }

    fn code(&self, rip: u64) -> Gpa {
        Gpa(PAGE | rip & 0xfff)
    }
}

fn context(rip: u64, rights: u32) -> Context {
    Context {
        address: rip,
        cr3: CR3,
        rights,
    }
}

const PAGING: Paging = Paging {
    cr0: 1 << 31 | 1,
    cr3: CR3,
    cr4: 1 << 5,
    efer: 1 << 10 | 1 << 11,
    rflags: 2,
    physical_bits: 40,
};

fn decoded() -> Decoded {
    Decoded::new(&CODE, Mode::Bits64, 0).unwrap()
}

fn plan() -> Move {
    decoded().plain_move().unwrap()
}

fn find(moves: &KnownCode, guest: &Guest, context: Context) -> Option<Move> {
    moves.find_move(&guest.memory, context).copied()
}

/// What is known in `context` after its move was done.
fn learn(guest: &Guest, context: Context) -> KnownCode {
    let mut moves = KnownCode::default();
    assert_eq!(find(&moves, guest, context), None);
    let mut code = [0; 15];
    if guest
        .memory
        .read(guest.code(context.address), &mut code)
        .is_ok()
    {
        moves.remember(&guest.memory, &PAGING, context, &code, &decoded());
    }
    moves
}

proptest! {
    /// A move is known while nothing has changed that it depends on: where the guest
    /// executes, an entry on the way, a byte of the code.
    #[test]
    fn a_move_is_known_while_all_is_as_it_was(
        rip: u64, (flags, rights) in prop::sample::select(vec![(7, USER), (3, KERNEL)]),
        other: u64, changed in 0..ENTRIES + 1, bit in 0..64u32,
    ) {
        let rip = ((rip << 16) as i64 >> 16) as u64 & !0xf;
        let guest = Guest::new(rip, [flags; ENTRIES]);
        let here = context(rip, rights);
        let mut moves = learn(&guest, here);
        prop_assert_eq!(find(&moves, &guest, here), Some(plan()));
        if other != rip {
            prop_assert_eq!(find(&moves, &guest, Context { address: other, ..here }), None);
        }
        prop_assert_eq!(find(&moves, &guest, Context { cr3: 0x7000, ..here }), None);
        prop_assert_eq!(find(&moves, &guest, Context { rights: rights ^ 0x60, ..here }), None);

        let at = guest.entries(rip).get(changed).copied().unwrap_or(guest.code(rip));
        let before = guest.memory.read_u64(at).unwrap();
        guest.memory.write(at, &(before ^ 1 << bit).to_le_bytes()).unwrap();
        prop_assert_eq!(find(&moves, &guest, here), None);
        guest.memory.write(at, &before.to_le_bytes()).unwrap();
        prop_assert_eq!(find(&moves, &guest, here), Some(plan()));
        moves.clear();
        prop_assert_eq!(find(&moves, &guest, here), None);
    }

    /// Nothing is kept that CR4 or EFER could make a fault without an entry changing.
    #[test]
    fn only_what_depends_on_nothing_else_is_kept(
        flags in prop::array::uniform4(prop::sample::select(vec![1u64, 3, 5, 7, 7 | 1 << 63])),
        rights in prop::sample::select(vec![KERNEL, USER, USER | 4]),
    ) {
        let rip = 0x1234_5678_9ab0;
        let guest = Guest::new(rip, flags);
        let here = context(rip, rights);
        let known = find(&learn(&guest, here), &guest, here).is_some();
        let user_page = flags.iter().all(|flags| flags & 4 != 0);
        let executable = flags.iter().all(|flags| flags >> 63 == 0);
        prop_assert_eq!(known, executable && rights & 4 == 0 && user_page == (rights == USER));
    }
}

#[test]
fn code_that_may_go_on_in_the_next_page_is_not_kept() {
    for (offset, kept) in [(0xff0, true), (0xff1, false), (0xfff, false)] {
        let rip = 0x1000 + offset;
        let guest = Guest::new(rip - 1, [3; ENTRIES]);
        guest.memory.write(guest.code(rip), &CODE[..1]).unwrap();
        let here = context(rip, KERNEL);
        let mut moves = KnownCode::default();
        moves.remember(&guest.memory, &PAGING, here, &CODE[..1], &decoded());
        assert_eq!(find(&moves, &guest, here).is_some(), kept, "{offset:#x}");
    }
}

/// In 32-bit code: an entry of four bytes, of which the one beside it is seen too; and without paging.
#[test]
fn other_paging() {
    const ADDRESS: u64 = 0x40_3120;
    let guest = Guest::new(0, [3; ENTRIES]);
    let memory = &guest.memory;
    let write = |at, value: u32| memory.write(Gpa(at), &value.to_le_bytes()).unwrap();
    write(CR3 + 4, 0x2003);
    write(0x2000 + 3 * 4, PAGE as u32 | 3);
    memory.write(guest.code(ADDRESS), &CODE).unwrap();
    let narrow = Paging {
        cr4: 0,
        efer: 0,
        ..PAGING
    };
    let here = context(ADDRESS, 0xc09b);
    let mut known = KnownCode::default();
    let mut code = [0; 15];
    memory.read(guest.code(ADDRESS), &mut code).unwrap();
    known.remember(memory, &narrow, here, &code, &decoded());
    assert_eq!(find(&known, &guest, here), Some(plan()));
    write(0x2000 + 3 * 4, PAGE as u32 | 1);
    assert_eq!(find(&known, &guest, here), None);
    let flat = Paging { cr0: 1, ..narrow };
    let here = context(guest.code(ADDRESS).0, 0xc09b);
    known.remember(memory, &flat, here, &code, &decoded());
    assert_eq!(find(&known, &guest, here), Some(plan()));
    // fld: whatever is no plain move.
    let other = Decoded::new(&[0xd9, 0x00], Mode::Bits32, 0).unwrap();
    memory.write(guest.code(ADDRESS), &[0xd9, 0x00]).unwrap();
    known.remember(memory, &flat, here, &[0xd9, 0x00], &other);
    assert!(known.find(memory, here).is_some());
    assert_eq!(find(&known, &guest, here), None);
}
