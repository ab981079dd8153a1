//! Where things are in the PC that a guest is shown: ports, interrupt numbers
//! and register values that the devices here and the ACPI and MP tables must
//! agree on.

/// Interrupt request number of the 8254's channel 0 on the 8259s.
pub const PIT_IRQ: u8 = 0;
/// I/O APIC pin of the 8254's channel 0: the interrupt source override of the MADT.
pub const PIT_PIN: u8 = 2;
/// I/O APIC pin that the 8259s' INTR output is wired to (delivery mode ExtINT).
pub const EXTINT_PIN: u8 = 0;
/// Interrupt request number of the keyboard controller.
pub const KEYBOARD_IRQ: u8 = 1;
/// Interrupt request number of COM1.
pub const COM1_IRQ: u8 = 4;
/// Interrupt request number of the real-time clock.
pub const RTC_IRQ: u8 = 8;
/// The system control interrupt of ACPI: level triggered, active high, as the
/// MADT's override says.
pub const SCI_IRQ: u8 = 9;

/// The two 8259As: command port; the data port is the next one.
pub const PIC_MASTER: u16 = 0x20;
/// See [`PIC_MASTER`].
pub const PIC_SLAVE: u16 = 0xa0;

/// Whether `port` is one of these four.
#[inline(always)]
pub const fn is_pic(port: u16) -> bool {
    const DIFFERENT: u16 = PIC_MASTER ^ PIC_SLAVE | 1;
    port & !DIFFERENT == PIC_MASTER
}

/// Edge/level control registers of the master and, in the next port, of the slave.
pub const ELCR: u16 = 0x4d0;
/// The 8254: three counters and, in the fourth port, the control word.
pub const PIT: u16 = 0x40;
/// NMI status and control, speaker, gate of the 8254's channel 2.
pub const SYSTEM_CONTROL: u16 = 0x61;
/// Index port of the real-time clock; data is the next port.
pub const RTC: u16 = 0x70;
/// Index in the CMOS memory of the century, for the FADT.
pub const RTC_CENTURY: u8 = 0x32;
/// Power-on self-test code, used by guests for a short delay.
pub const POST_CODE: u16 = 0x80;
/// Fast A20 and reset.
pub const FAST_A20: u16 = 0x92;
/// Data port of the keyboard controller.
pub const KEYBOARD_DATA: u16 = 0x60;
/// Status and command port of the keyboard controller.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// First of the eight ports of COM1.
pub const COM1: u16 = 0x3f8;
/// Address port of PCI configuration mechanism 1.
pub const PCI_ADDRESS: u16 = 0xcf8;
/// First of the four data ports of PCI configuration mechanism 1.
pub const PCI_DATA: u16 = 0xcfc;
/// Reset control register (the FADT's RESET_REG, one byte).
pub const RESET_CONTROL: u16 = 0xcf9;
/// What to write to [`RESET_CONTROL`] for a full reset (the FADT's RESET_VALUE).
pub const RESET_VALUE: u8 = 0x06;

/// Four ports that end the machine, with the code that is written (QEMU's `isa-debug-exit`).
pub const DEBUG_EXIT: u16 = 0xf4;
/// What is written here is shown on the guest's console (Bochs's and QEMU's debug console).
pub const DEBUG_CONSOLE: u16 = 0xe9;

/// Selects an item of [`super::fw_cfg`], in 16 bits.
pub const FW_CFG_SELECTOR: u16 = 0x510;
/// Its bytes.
pub const FW_CFG_DATA: u16 = 0x511;
/// Where a transfer is described: the upper half, then the lower one, which begins it.
pub const FW_CFG_DMA: u16 = 0x514;

/// Four ports that read as they were last written ([`super::test`]).
pub const TEST_ECHO: u16 = 0xe0;
/// Unmaps the page whose address is written.
pub const TEST_UNMAP: u16 = 0xe4;
/// The first of the ports that drive interrupt lines.
pub const TEST_LINES: u16 = 0x2000;
/// Memory of which each access exits.
pub const TEST_MEMORY: u64 = 0xff00_0000;
/// Bytes of [`TEST_MEMORY`].
pub const TEST_MEMORY_LENGTH: u64 = 0x1_0000;

/// First port of the power-management block.
pub const PM_BASE: u16 = 0x600;
/// Ports in the power-management block.
pub const PM_LENGTH: u16 = 12;
/// PM1a event block (status and enable): 4 bytes.
pub const PM1A_EVENT: u16 = PM_BASE;
/// PM1a control block: 2 bytes.
pub const PM1A_CONTROL: u16 = PM_BASE + 4;
/// The power-management timer: 4 bytes.
pub const PM_TIMER: u16 = PM_BASE + 8;
/// Whether the power-management timer has 32 bits (the FADT's TMR_VAL_EXT) or 24.
pub const PM_TIMER_32_BIT: bool = true;
/// The FADT's SMI_CMD; the next port holds a status byte.
pub const SMI_COMMAND: u16 = 0xb2;
/// Value for [`SMI_COMMAND`] that turns ACPI mode on.
pub const ACPI_ENABLE: u8 = 0xf1;
/// Value for [`SMI_COMMAND`] that turns ACPI mode off.
pub const ACPI_DISABLE: u8 = 0xf0;
/// SLP_TYP of suspend to RAM.
pub const S3_SLEEP_TYPE: u8 = 1;
/// SLP_TYP of soft-off, for the `\_S5` package.
pub const S5_SLEEP_TYPE: u8 = 5;
/// That of the PIIX4, which kernels and firmware for QEMU's PC use without looking.
pub const PIIX4_OFF_SLEEP_TYPE: u8 = 0;

/// Where the local APICs' registers are after a reset.
pub const LOCAL_APIC_BASE: u64 = 0xfee0_0000;
/// Guest physical address of the I/O APIC's page.
pub const IO_APIC_BASE: u64 = 0xfec0_0000;
/// End of the guest physical addresses from [`IO_APIC_BASE`] on that belong to the interrupt
/// controllers: memory is never there.
pub const INTERRUPT_CONTROLLERS_END: u64 = 0xff00_0000;

/// Whether `gpa` is one of the interrupt controllers'.
#[inline(always)]
pub const fn is_interrupt_controller(gpa: u64) -> bool {
    gpa.wrapping_sub(IO_APIC_BASE) < INTERRUPT_CONTROLLERS_END - IO_APIC_BASE
}
