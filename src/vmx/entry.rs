//! The way into the guest and back: the whole exit path that is not Rust.
//!
//! A vCPU has a stack of its own, and at its top a [`Frame`]. The host stack
//! pointer in the VMCS is constant: it points right behind the frame's
//! register block, so that the exit stub's pushes *are* the block, and the
//! handler's stack continues below it. Nothing else is saved, because the
//! hypervisor touches nothing else.
//!
//! ```text
//!   higher   handler, run_rsp, context     rest of the frame
//!            r15 ... rax                   register block, made by 16 pushes   <- host RSP
//!   lower    the handler's stack
//! ```

use super::vmcs::{Vmcs, host};
use crate::arch::registers::GeneralRegisters;
use crate::host::memory::paging::MapError;
use crate::host::memory::stack::Stack;
use core::arch::naked_asm;
use core::mem::offset_of;
use core::ptr;

/// Pages of a vCPU's stack, the frame at its top included.
const STACK_PAGES: u64 = 8;

/// Who answers VM exits.
pub trait Guest {
    /// Answers one exit, on the vCPU's own stack, with interrupts off.
    fn exit(&mut self, registers: &mut GeneralRegisters) -> Next;
}

/// A vCPU's stack with the frame at its top.
pub struct Entry {
    stack: Stack,
}

impl Entry {
    /// A stack, and the host stack and instruction pointer of `vmcs` for it.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(vmcs: &mut Vmcs) -> Result<Self, MapError> {
        let entry = Self {
            stack: Stack::new(STACK_PAGES)?,
        };
        vmcs.write(
            host::RSP,
            entry.frame() as u64 + size_of::<GeneralRegisters>() as u64,
        );
        vmcs.write(host::RIP, exit_stub as *const () as u64);
        Ok(entry)
    }

    fn frame(&self) -> *mut Frame {
        (self.stack.top().0 - size_of::<Frame>() as u64) as *mut Frame
    }

    /// The guest's registers, while it does not run.
    pub fn registers(&mut self) -> &mut GeneralRegisters {
        // SAFETY: the frame lies in the stack that `self` owns, zeroed when it was made.
        unsafe { &mut (*self.frame()).registers }
    }

    /// Runs the guest whose VMCS is current, until `guest` asks to leave.
    pub fn run<G: Guest>(&mut self, guest: &mut G) -> Left {
        let frame = self.frame();
        // SAFETY: the frame is ours (`registers`). The host part of the VMCS was written by
        // `new` and `host_state`, which nothing outside `vmx` can change; `guest` outlives the
        // call, and reaches the handler only while `enter` waits.
        unsafe {
            ptr::addr_of_mut!((*frame).handler).write(answer::<G>);
            ptr::addr_of_mut!((*frame).context).write(ptr::from_mut(guest).cast());
            enter(frame)
        }
    }
}

extern "C" fn answer<G: Guest>(frame: &mut Frame) -> Next {
    // SAFETY: `Entry::run` stored a `G` that it borrows until the guest has left.
    let guest = unsafe { &mut *frame.context.cast::<G>() };
    guest.exit(&mut frame.registers)
}

/// What the exit handler wants next.
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
    /// Called at each VM exit.
    handler: extern "C" fn(&mut Frame) -> Next,
    /// The stack pointer of [`enter`]'s caller.
    run_rsp: u64,
    /// The guest of the handler.
    context: *mut (),
}

const HANDLER: usize = offset_of!(Frame, handler);
const RUN_RSP: usize = offset_of!(Frame, run_rsp);
/// As seen when the register block is popped.
const RUN_RSP_BEHIND: usize = RUN_RSP - size_of::<GeneralRegisters>();

/// Runs the guest until the handler asks to leave.
///
/// # Safety
/// The current VMCS is complete; its host RIP is [`exit_stub`] and its host
/// RSP the end of the register block of `frame`, which lies at the top of a
/// stack that nothing else uses. Interrupts are off.
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
        "push r15",
        "push r14",
        "push r13",
        "push r12",
        "push r11",
        "push r10",
        "push r9",
        "push r8",
        "push rdi",
        "push rsi",
        "push rbp",
        "push rax", // the slot of RSP, which the VMCS has
        "push rbx",
        "push rdx",
        "push rcx",
        "push rax",
        "mov rdi, rsp",
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
        // Neither entered: CF is VMfailInvalid, ZF VMfailValid. None of these change flags.
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
