//! COM1 beyond sending: loopback, FIFO, interrupts.

use super::legacy::PIC_VECTOR;
use core::cell::Cell;
use vireo_test_guests::exceptions::{self, Frame};
use vireo_test_guests::port::{in8, out8};
use vireo_test_guests::serial::{self, COM1};
use vireo_test_guests::{check, check_detail, check_equal, cpu, pic, time};

const INTERRUPT_ENABLE: u16 = COM1 + 1;
const INTERRUPT_ID: u16 = COM1 + 2;
const FIFO_CONTROL: u16 = COM1 + 2;
const LINE_CONTROL: u16 = COM1 + 3;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;
const MODEM_STATUS: u16 = COM1 + 6;
const SCRATCH: u16 = COM1 + 7;

const LOOPBACK: u8 = 0x10;
const DATA_READY: u8 = 1;
const OVERRUN: u8 = 2;
const VECTOR: u8 = PIC_VECTOR + 4;

pub fn check_all() {
    serial::flush();
    let modem_control = in8(MODEM_CONTROL);
    registers();
    loopback();
    serial::flush();
    out8(MODEM_CONTROL, modem_control);
    interrupts();
    out8(MODEM_CONTROL, modem_control);
}

fn registers() {
    out8(SCRATCH, 0xa5);
    let scratch = in8(SCRATCH);
    let line_control = in8(LINE_CONTROL);
    out8(LINE_CONTROL, line_control | 0x80);
    let old = (in8(COM1), in8(COM1 + 1));
    out8(COM1, 0x0c);
    out8(COM1 + 1, 0x00);
    let divisor = (in8(COM1), in8(COM1 + 1));
    out8(COM1, old.0);
    out8(COM1 + 1, old.1);
    out8(LINE_CONTROL, line_control);
    check_equal("UART scratch register keeps a byte", scratch, 0xa5);
    check_equal("UART divisor reads back", divisor, (0x0c, 0x00));
}

fn loopback() {
    // Nothing can be said in loopback mode: results first, checks later.
    out8(MODEM_CONTROL, LOOPBACK | 0x0f);
    let lines = in8(MODEM_STATUS) >> 4;
    out8(MODEM_CONTROL, LOOPBACK);
    let no_lines = in8(MODEM_STATUS) >> 4;
    out8(FIFO_CONTROL, 0x07);
    let with_fifo = in8(INTERRUPT_ID) >> 6;
    for byte in 0..16 {
        while in8(LINE_STATUS) & 0x20 == 0 {}
        out8(COM1, byte);
    }
    let all = time::wait(time::microseconds(5_000), || in8(LINE_STATUS) & 0x40 != 0);
    let ready = in8(LINE_STATUS);
    let mut received = [0xffu8; 16];
    for byte in &mut received {
        time::wait(time::microseconds(500), || {
            in8(LINE_STATUS) & DATA_READY != 0
        });
        *byte = in8(COM1);
    }
    let empty = in8(LINE_STATUS);
    // Reading the line status takes the overrun back: every value that was read counts.
    let seen = Cell::new(0);
    let status_has = |bit| {
        let status = in8(LINE_STATUS);
        seen.set(seen.get() | status);
        status & bit != 0
    };
    for byte in 0..17 {
        while !status_has(0x20) {}
        out8(COM1, byte);
    }
    time::wait(time::microseconds(5_000), || status_has(0x40));
    let overrun = seen.get();
    let overrun_again = in8(LINE_STATUS) & OVERRUN;
    out8(FIFO_CONTROL, 0x07);
    let cleared = in8(LINE_STATUS);
    out8(MODEM_CONTROL, 0);

    check_equal(
        "UART loopback joins the modem lines",
        (lines, no_lines),
        (0xf, 0),
    );
    check_equal("UART FIFO is shown", with_fifo, 3);
    check("UART loopback sends", all.is_some());
    check("UART loopback receives", ready & DATA_READY != 0);
    check(
        "UART FIFO keeps sixteen bytes in order",
        received.iter().zip(0..).all(|(a, b)| *a == b),
    );
    check_equal("UART FIFO is empty then", empty & DATA_READY, 0);
    check_detail(
        "UART shows an overrun",
        overrun & OVERRUN != 0,
        format_args!("line status {overrun:#x}"),
    );
    check_equal("UART shows an overrun only once", overrun_again, 0);
    check_equal("UART FIFO can be emptied", cleared & DATA_READY, 0);
}

fn end(_: &mut Frame) {
    // Reading the identification takes the transmitter's interrupt back.
    in8(INTERRUPT_ID);
    pic::eoi(false);
}

fn interrupts() {
    serial::flush();
    out8(MODEM_CONTROL, 0x0b);
    pic::enable(1 << 4);
    exceptions::on(VECTOR, end);
    out8(INTERRUPT_ENABLE, 0x02);
    cpu::interrupt_window();
    let first = exceptions::count(VECTOR);
    cpu::interrupt_window();
    let second = exceptions::count(VECTOR);
    out8(COM1, b'-');
    time::spin(time::microseconds(2_000));
    cpu::interrupt_window();
    let third = exceptions::count(VECTOR);
    out8(INTERRUPT_ENABLE, 0);
    let id = in8(INTERRUPT_ID);
    pic::enable(0);
    out8(COM1, b'\r');
    out8(COM1, b'\n');
    check_equal(
        "UART interrupts when its transmitter is empty, once, and again after a byte",
        (first, second, third),
        (1, 1, 2),
    );
    check_equal("UART has no interrupt when none is enabled", id & 0x0f, 1);
}
