//! The way into the guest and back: the whole exit path that is not Rust.
//!
//! A vCPU has a stack of its own, and at its top a [`Frame`]. The host stack
//! pointer in the VMCS is constant: it points at the frame, whose beginning is
//! the register block, so that the exit stub knows where everything is, and the
//! handlers' stack is what lies below.
//!
//! ```text
//!   higher   counts, times, handlers, context     rest of the frame
//!            r15 ... rax <- host RSP              register block
//!   lower    the handlers' stack
//! ```
//!
//! An exit takes one of two ways. The stub stores the ten registers that
//! compiled code may change, counts and remembers the exit by its reason ([`super::trace`]) and calls the *light*
//! handler of that reason: a table of functions that see RAX, RBX, RCX and RDX, or by
//! way of [`with_all`] all but RSP. Mostly that was all, and the ten are loaded again.
//! Where the light handler says so, the other five are stored too and the *heavy*
//! handler is called, which sees all of them and may leave the run. Nothing else is
//! saved on either way, because the hypervisor touches nothing else.
//!
//! # How long exits take
//!
//! Where somebody wants to know ([`Statistics::record_times`]), the frame names
//! another table, all of whose entries are [`timed`]: it calls the light handler between
//! two RDTSCs. Where that was not enough, it has the heavy handler replaced for once,
//! so that the exit ends where that returns. Switched off, the path is the same to the
//! instruction. A time reaches
//!
//! - from behind the stub's work before the handler: its stores, VMREAD, count and call,
//!   some twenty instructions;
//! - to before its loads and VMRESUME, again a dozen or two; or, where the run is left,
//!   to there. So what a halted guest waits is no exit's time, nor is what the run loop
//!   does between leaving and the next entry.
//!
//! What the CPU takes for the transitions is outside too. RDTSC is not serialized: on silicon a
//! time is right to some tens of ticks.

use super::exit_reason::REASONS;
use super::exit_times::ExitTimes;
use super::trace::{Place, Recorder, Traced};
use super::vmcs::{Vmcs, guest, host, information};
use crate::arch::cpu::rdtsc;
use crate::arch::registers::{GeneralRegisters, LightRegisters};
use crate::host::memory::paging::MapError;
use crate::host::memory::stack::Stack;
use alloc::collections::TryReserveError;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::arch::naked_asm;
use core::marker::PhantomData;
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use spin::Once;

/// Pages of a vCPU's stack, the frame at its top included.
const STACK_PAGES: u64 = 8;

/// Answers one exit that needs no more than these registers.
pub type LightHandler<G> = extern "C" fn(&mut G, &mut LightRegisters) -> Verdict;

/// A light handler that sees all registers but the stack pointer: see [`with_all`].
pub trait WithAll<G> {
    /// Answers the exit.
    extern "C" fn answer(guest: &mut G, registers: &mut GeneralRegisters) -> Verdict;
}

/// The light handler that `H` is: stores what the stub has not, and loads it again.
#[unsafe(naked)]
pub extern "C" fn with_all<G, H: WithAll<G>>(_: &mut G, _: &mut LightRegisters) -> Verdict {
    naked_asm!(
        "mov [rsi + 8 * 5], rbp",
        "mov [rsi + 8 * 12], r12",
        "mov [rsi + 8 * 13], r13",
        "mov [rsi + 8 * 14], r14",
        "mov [rsi + 8 * 15], r15",
        "push rsi",
        "call {answer}",
        "pop rsi",
        "mov rbp, [rsi + 8 * 5]",
        "mov r12, [rsi + 8 * 12]",
        "mov r13, [rsi + 8 * 13]",
        "mov r14, [rsi + 8 * 14]",
        "mov r15, [rsi + 8 * 15]",
        "ret",
        answer = sym H::answer,
    )
}

/// Light handlers by basic exit reason.
pub type LightTable<G> = [LightHandler<G>; REASONS];

/// Who answers VM exits: on the vCPU's own stack, with interrupts off.
pub trait Guest: Sized + 'static {
    /// What is asked first.
    const LIGHT: &'static LightTable<Self>;

    /// Answers an exit for which its light handler said [`Verdict::HEAVY`], or whose
    /// reason has none.
    fn exit(&mut self, registers: &mut GeneralRegisters) -> Next;

    /// Called where a light handler has answered and wants the run to be left, perhaps.
    fn attend(&mut self) -> Next;

    /// The current VMCS.
    fn vmcs(&self) -> &Vmcs;
}

/// What a light handler says: [`Verdict::RESUME`], [`Verdict::HEAVY`], or anything
/// else where the exit is answered and [`Guest::attend`] is to be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Verdict(pub u32);

impl Verdict {
    /// The exit is answered: straight back into the guest.
    pub const RESUME: Self = Self(0);
    /// The exit is not answered, and nothing was done.
    pub const HEAVY: Self = Self(u32::MAX);
}

/// A vCPU's stack with the frame at its top, from which guests of type `G` are run.
pub struct Entry<G> {
    shared: Arc<Shared>,
    guest: PhantomData<fn(&mut G)>,
}

/// What [`Entry`] and [`Statistics`] share.
struct Shared {
    stack: Stack,
    /// Since they were first wanted.
    times: Once<ExitTimes>,
}

impl Shared {
    fn frame(&self) -> *mut Frame {
        (self.stack.top().0 - size_of::<Frame>() as u64) as *mut Frame
    }
}

impl<G: Guest> Entry<G> {
    /// A stack, and the host stack and instruction pointer of `vmcs` for it.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(vmcs: &mut Vmcs) -> Result<Self, MapError> {
        let shared = Shared {
            stack: Stack::new(STACK_PAGES)?,
            times: Once::new(),
        };
        let frame = shared.frame();
        // SAFETY: the frame lies in the stack that was just made, zeroed, and nobody else
        // knows of it.
        unsafe {
            ptr::addr_of_mut!((*frame).handler).write(answer::<G>);
            ptr::addr_of_mut!((*frame).light).write(AtomicPtr::new(pointer(G::LIGHT)));
        }
        vmcs.write(host::RSP, frame as u64);
        vmcs.write(host::RIP, exit_stub as *const () as u64);
        Ok(Self {
            shared: Arc::new(shared),
            guest: PhantomData,
        })
    }

    /// The guest's registers, while it does not run.
    pub fn registers(&mut self) -> &mut GeneralRegisters {
        // SAFETY: the frame lies in the stack that `self` keeps; this field is only `self`'s.
        unsafe { &mut (*self.shared.frame()).registers }
    }

    /// Its statistics, which outlive it.
    pub fn statistics(&self) -> Statistics<G> {
        Statistics {
            shared: Arc::clone(&self.shared),
            guest: PhantomData,
        }
    }

    /// Runs the guest whose VMCS is current, until `guest` asks to leave.
    pub fn run(&mut self, guest: &mut G) -> Left {
        let frame = self.shared.frame();
        // SAFETY: the frame is ours (`registers`). The host part of the VMCS was written by
        // `new` and `host_state`, which nothing outside `vmx` can change; `guest` outlives the
        // call, and reaches the handler only while `enter` waits.
        unsafe {
            ptr::addr_of_mut!((*frame).context).write(ptr::from_mut(guest).cast());
            enter(frame)
        }
    }
}

/// How often a vCPU has exited and why, and how long that took: for any CPU, also while
/// the guest runs.
pub struct Statistics<G> {
    shared: Arc<Shared>,
    guest: PhantomData<fn(&mut G)>,
}

impl<G: Guest> Statistics<G> {
    /// Exits so far, by basic reason.
    pub fn counts(&self) -> [u64; REASONS] {
        // SAFETY: as in `Entry::registers`; atomics are shared, and the exit stub's INC is
        // an aligned store of eight bytes.
        let counts = unsafe { &(*self.shared.frame()).counts };
        counts.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    /// The last exits, the oldest first.
    pub fn trace(&self) -> Vec<Traced> {
        let total = self.counts().iter().sum();
        // SAFETY: as in `Entry::registers`; atomics are shared, and the exit stub stores bytes.
        let recorder = unsafe { &(*self.shared.frame()).trace };
        recorder.exits(total)
    }

    /// What exits took while that was recorded; `None` if it never was.
    pub fn times(&self) -> Option<&ExitTimes> {
        self.shared.times.get()
    }

    /// Records from the next exit on how long exits take, or no longer.
    ///
    /// # Errors
    /// When no memory is left for the record.
    pub fn record_times(&self, on: bool) -> Result<(), TryReserveError> {
        let table = if on {
            let times = self.shared.times.try_call_once(ExitTimes::new)?;
            // SAFETY: as in `Entry::registers`; an atomic is shared.
            let known = unsafe { &(*self.shared.frame()).times };
            known.store(ptr::from_ref(times).cast_mut(), Ordering::Relaxed);
            Timed::<G>::TABLE
        } else {
            G::LIGHT
        };
        // SAFETY: as above.
        let light = unsafe { &(*self.shared.frame()).light };
        // Released: a CPU that finds the timed table finds `times` too, as x86 keeps loads in order.
        light.store(pointer(table), Ordering::Release);
        Ok(())
    }
}

const fn pointer<G>(table: &'static LightTable<G>) -> *mut () {
    ptr::from_ref(table).cast_mut().cast()
}

/// The light table of a guest whose exits are timed.
struct Timed<G>(PhantomData<G>);

impl<G: Guest> Timed<G> {
    const TABLE: &'static LightTable<G> = &[timed::<G>; REASONS];
}

/// Stands for each light handler, between [`begin`] and [`finish`]. It passes on what the stub
/// still knows: the reason in EAX, and that the registers are the beginning of the
/// frame; and the registers that the stub has not stored, which the handler may look for.
#[unsafe(naked)]
extern "C" fn timed<G: Guest>(_: &mut G, _: &mut LightRegisters) -> Verdict {
    naked_asm!(
        "push rsi",
        "push rdi",
        "sub rsp, 8",
        "mov rdi, rsi",
        "mov esi, eax",
        "call {begin}",
        "add rsp, 8",
        "pop rdi",
        "mov rsi, [rsp]",
        "call rax",
        "pop rdi",
        "mov esi, eax",
        "jmp {finish}",
        begin = sym begin::<G>,
        finish = sym finish::<G>,
    )
}

/// Begins an exit: gives the light handler of `reason`.
///
/// # Safety
/// `frame` is the one of the vCPU that exited.
unsafe extern "C" fn begin<G: Guest>(frame: *mut Frame, reason: usize) -> LightHandler<G> {
    let start = rdtsc();
    // SAFETY: the caller's promise; nobody else uses this field.
    unsafe { (*frame).unfinished = Unfinished { reason, start } };
    G::LIGHT[reason % REASONS]
}

/// Where the light handler's `verdict` is that it has answered, the exit has ended.
///
/// # Safety
/// `frame` is the one of the vCPU that exited, for which [`begin`] was called.
unsafe extern "C" fn finish<G: Guest>(frame: *mut Frame, verdict: Verdict) -> Verdict {
    // SAFETY: the caller's promise; nobody else uses these two fields.
    unsafe {
        if verdict == Verdict::RESUME {
            let Unfinished { reason, start } = (*frame).unfinished;
            record(frame, reason, start);
        } else {
            (*frame).handler = answer_timed::<G>;
        }
    }
    verdict
}

/// Records that an exit has ended that [`begin`] saw begin at `start`.
///
/// # Safety
/// As for [`finish`].
#[inline(always)]
unsafe fn record(frame: *const Frame, reason: usize, start: u64) {
    // SAFETY: the caller's promise; `times` was set before the table that leads here, and
    // `Shared` keeps it as long as the frame.
    let times = unsafe { (*frame).times.load(Ordering::Relaxed).as_ref() };
    if let Some(times) = times {
        // 0 where somebody has set the counter back.
        times.record(reason, rdtsc().saturating_sub(start));
    }
}

/// [`answer`] for an exit that [`begin`] has begun, whatever the table is by now.
///
/// # Safety
/// As for [`answer`].
unsafe extern "C" fn answer_timed<G: Guest>(frame: *mut Frame, verdict: Verdict) -> Next {
    // SAFETY: the caller's promise, and that of `finish`.
    unsafe {
        (*frame).handler = answer::<G>;
        let Unfinished { reason, start } = (*frame).unfinished;
        let next = answer::<G>(frame, verdict);
        record(frame, reason, start);
        next
    }
}

/// Answers an exit for which a light handler was not enough. Never inlined into
/// [`answer_timed`]: with one caller, `G`'s handlers are inlined here.
///
/// # Safety
/// `frame` is the one of the vCPU that exited, on whose stack this runs.
#[inline(never)]
unsafe extern "C" fn answer<G: Guest>(frame: *mut Frame, verdict: Verdict) -> Next {
    // SAFETY: `Entry::run` stored a `G` that it borrows until the guest has left; the registers
    // are the handlers' until then.
    let (guest, registers) =
        unsafe { (&mut *(*frame).context.cast::<G>(), &mut (*frame).registers) };
    if verdict == Verdict::HEAVY {
        let vmcs = guest.vmcs();
        let place = Place {
            rip: vmcs.read_basic(guest::RIP),
            qualification: vmcs.read_basic(information::EXIT_QUALIFICATION),
            ticks: rdtsc(),
        };
        // SAFETY: the caller's promise; atomics are shared.
        unsafe { &(*frame).trace }.heavy(place);
        guest.exit(registers)
    } else {
        guest.attend()
    }
}

/// What the heavy handler wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Next {
    /// Straight back into the guest.
    Resume = 0,
    /// Leave [`enter`]: the run loop has work.
    Leave = 1,
}

/// Why [`enter`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Left {
    /// The handler said [`Next::Leave`].
    Handler = 1,
    /// VMfailInvalid: no current VMCS.
    FailInvalid = 2,
    /// VMfailValid: the VM-instruction error field says why.
    FailValid = 3,
}

/// The part of a vCPU that the stubs know.
#[repr(C, align(16))]
struct Frame {
    /// The guest's registers while the host runs.
    registers: GeneralRegisters,
    /// Called where a light handler was not enough.
    handler: unsafe extern "C" fn(*mut Frame, Verdict) -> Next,
    /// The [`LightTable`] of the guest, or the one that times it. Released behind `times`, which the
    /// timing handlers use; x86 keeps the stub's loads in order.
    light: AtomicPtr<()>,
    /// The stack pointer of [`enter`]'s caller.
    run_rsp: u64,
    /// The guest of the handlers.
    context: *mut (),
    /// By basic reason. Only the exit stub writes them, and readers are people: relaxed.
    counts: [AtomicU64; REASONS],
    /// Those of [`Shared`], once they are wanted.
    times: AtomicPtr<ExitTimes>,
    unfinished: Unfinished,
    trace: Recorder,
}

/// An exit that is timed and has not ended.
#[derive(Clone, Copy)]
struct Unfinished {
    reason: usize,
    /// The time-stamp counter when it began.
    start: u64,
}

const BLOCK: usize = size_of::<GeneralRegisters>();
const HANDLER: usize = offset_of!(Frame, handler);
const LIGHT: usize = offset_of!(Frame, light);
const CONTEXT: usize = offset_of!(Frame, context);
const COUNTS: usize = offset_of!(Frame, counts);
const NEXT: usize = offset_of!(Frame, trace.next);
const LAST: usize = offset_of!(Frame, trace.reasons);
const RUN_RSP: usize = offset_of!(Frame, run_rsp);
/// As seen when the register block is popped.
const RUN_RSP_BEHIND: usize = RUN_RSP - BLOCK;

/// Runs the guest until the handler asks to leave.
///
/// # Safety
/// The current VMCS is complete; its host RIP is [`exit_stub`] and its host
/// RSP is `frame`, which lies at the top of a stack that nothing else uses.
/// Interrupts are off.
#[unsafe(naked)]
unsafe extern "C" fn enter(frame: *mut Frame) -> Left {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi + {run_rsp}], rsp",
        "mov rsp, rdi",
        "jmp {resume}",
        run_rsp = const RUN_RSP,
        resume = sym resume,
    )
}

/// Where VM exits land: host RIP.
#[unsafe(naked)]
unsafe extern "C" fn exit_stub() {
    naked_asm!(
        "mov [rsp + 8 * 0], rax",
        "mov [rsp + 8 * 1], rcx",
        "mov [rsp + 8 * 2], rdx",
        "mov [rsp + 8 * 3], rbx",
        "mov [rsp + 8 * 6], rsi",
        "mov [rsp + 8 * 7], rdi",
        "mov [rsp + 8 * 8], r8",
        "mov [rsp + 8 * 9], r9",
        "mov [rsp + 8 * 10], r10",
        "mov [rsp + 8 * 11], r11",
        "mov ecx, {reason}",
        "vmread rax, rcx",
        // Failed entries have bit 31 set, and basic reasons whose handler looks for it.
        "and eax, {reasons} - 1",
        "inc qword ptr [rsp + 8 * rax + {counts}]",
        "movzx ecx, byte ptr [rsp + {next}]",
        "mov [rsp + rcx + {last}], al",
        "inc byte ptr [rsp + {next}]",
        #[cfg(feature = "count-vmcs")]
        "push rax; push rax; mov edi, eax; call {counted}; pop rax; pop rax",
        "mov rdi, [rsp + {context}]",
        "mov rsi, rsp",
        "mov rcx, [rsp + {light}]",
        "call [rcx + 8 * rax]",
        "test eax, eax",
        "jnz {heavy}",
        "mov rax, [rsp + 8 * 0]",
        "mov rcx, [rsp + 8 * 1]",
        "mov rdx, [rsp + 8 * 2]",
        "mov rbx, [rsp + 8 * 3]",
        "mov rsi, [rsp + 8 * 6]",
        "mov rdi, [rsp + 8 * 7]",
        "mov r8, [rsp + 8 * 8]",
        "mov r9, [rsp + 8 * 9]",
        "mov r10, [rsp + 8 * 10]",
        "mov r11, [rsp + 8 * 11]",
        "vmresume",
        // As `failed` expects it.
        "lea rsp, [rsp + {block}]",
        "jmp {failed}",
        block = const BLOCK,
        reason = const information::EXIT_REASON.encoding(),
        reasons = const REASONS,
        counts = const COUNTS,
        next = const NEXT,
        last = const LAST,
        context = const CONTEXT,
        light = const LIGHT,
        #[cfg(feature = "count-vmcs")]
        counted = sym super::count::exit,
        heavy = sym heavy,
        failed = sym failed,
    )
}

/// The rest of an exit for which a light handler was not enough; EAX has its [`Verdict`].
#[unsafe(naked)]
unsafe extern "C" fn heavy() {
    naked_asm!(
        "mov [rsp + 8 * 5], rbp",
        "mov [rsp + 8 * 12], r12",
        "mov [rsp + 8 * 13], r13",
        "mov [rsp + 8 * 14], r14",
        "mov [rsp + 8 * 15], r15",
        "mov rdi, rsp",
        "mov esi, eax",
        "call [rsp + {handler}]",
        "test eax, eax",
        "jz {resume}",
        "mov rsp, [rsp + {run_rsp}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        handler = const HANDLER,
        run_rsp = const RUN_RSP,
        resume = sym resume,
    )
}

/// Loads the guest's registers from the block that RSP points at, and enters.
///
/// VMRESUME of a VMCS that was not launched yet fails and falls through to
/// VMLAUNCH, so that no one keeps a "launched" flag.
#[unsafe(naked)]
unsafe extern "C" fn resume() {
    naked_asm!(
        "pop rax",
        "pop rcx",
        "pop rdx",
        "pop rbx",
        "lea rsp, [rsp + 8]",
        "pop rbp",
        "pop rsi",
        "pop rdi",
        "pop r8",
        "pop r9",
        "pop r10",
        "pop r11",
        "pop r12",
        "pop r13",
        "pop r14",
        "pop r15",
        "vmresume",
        "vmlaunch",
        "jmp {failed}",
        failed = sym failed,
    )
}

/// Neither entered: CF is VMfailInvalid, ZF VMfailValid. Returns to [`enter`]'s caller.
#[unsafe(naked)]
unsafe extern "C" fn failed() {
    naked_asm!(
        // None of these change flags.
        "mov rsp, [rsp + {run_rsp}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "mov eax, {valid}",
        "mov ecx, {invalid}",
        "cmovc eax, ecx",
        "ret",
        run_rsp = const RUN_RSP_BEHIND,
        valid = const Left::FailValid as u64,
        invalid = const Left::FailInvalid as u64,
    )
}
