"""16550A against its data sheet, and against what Linux's 8250 driver asks it."""

from __future__ import annotations

import pytest

from devices.uart16550 import Reg, Uart16550
from tests.devices.rig import Rig

CHARACTER_NS = 10 * 1_000_000_000 // 115_200


def make(mcr: int = 0x0B, divisor: int = 1) -> Rig[Uart16550]:
    uart = Rig(Uart16550, "regs")
    uart.w(Reg.LCR, 0x80)
    uart.w(Reg.DATA, divisor)
    uart.w(Reg.IER, 0)
    uart.w(Reg.LCR, 0x03)
    uart.w(Reg.MCR, mcr)
    uart.r(Reg.MSR)
    return uart


def irq(uart: Rig[Uart16550]) -> bool:
    return uart.wiring.irq["intr"]


def receive(uart: Rig[Uart16550], data: bytes) -> None:
    assert len(data) <= uart.device.room("rx")
    uart.device.receive("rx", data)


def test_reset_values() -> None:
    uart = Rig(Uart16550, "regs")
    registers = [uart.r(reg) for reg in Reg]
    assert registers == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]
    assert not irq(uart)


def test_reset_keeps_divisor_and_scratch() -> None:
    uart = make(divisor=3)
    uart.w(Reg.SCR, 0x5A)
    uart.device.reset()
    uart.w(Reg.LCR, 0x80)
    assert (uart.r(Reg.DATA), uart.r(Reg.IER), uart.r(Reg.SCR)) == (3, 0, 0x5A)


def test_transmission_sends_and_raises_thre_again() -> None:
    uart = make()
    uart.w(Reg.IER, 0x02)
    assert irq(uart)
    assert uart.r(Reg.IIR_FCR) == 0x02
    assert not irq(uart)
    uart.w(Reg.DATA, 0x41)
    assert uart.wiring.sent == [("tx", b"A")]
    assert irq(uart)
    assert uart.r(Reg.LSR) == 0x60


def test_enabling_thre_interrupts_each_time() -> None:
    """serial8250_do_startup's THRE test: without it Linux sets UART_BUG_THRE."""
    uart = make()
    for _ in range(2):
        uart.w(Reg.IER, 0x02)
        assert uart.r(Reg.IIR_FCR) == 0x02
        uart.w(Reg.IER, 0)


def test_reading_iir_clears_thre_only_when_it_is_the_cause() -> None:
    uart = make()
    uart.w(Reg.IER, 0x03)
    receive(uart, b"x")
    assert uart.r(Reg.IIR_FCR) == 0x04
    assert uart.r(Reg.DATA) == ord("x")
    assert uart.r(Reg.IIR_FCR) == 0x02
    assert uart.r(Reg.IIR_FCR) == 0x01


def test_interrupt_priorities() -> None:
    uart = make()
    uart.w(Reg.IIR_FCR, 0x01)
    uart.w(Reg.MCR, 0x10)  # loopback: the way to an overrun, and all modem lines fall
    for _ in range(17):
        uart.w(Reg.DATA, 0x55)
    uart.w(Reg.MCR, 0x0B)
    uart.w(Reg.IER, 0x0F)
    causes = [uart.r(Reg.IIR_FCR)]
    assert uart.r(Reg.LSR) == 0x63
    causes.append(uart.r(Reg.IIR_FCR))
    for _ in range(16):
        assert uart.r(Reg.DATA) == 0x55
    causes += [uart.r(Reg.IIR_FCR), uart.r(Reg.IIR_FCR)]
    uart.r(Reg.MSR)
    causes.append(uart.r(Reg.IIR_FCR))
    assert causes == [0xC6, 0xC4, 0xC2, 0xC0, 0xC1]


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_fifo_trigger(fcr: int, trigger: int) -> None:
    uart = make()
    uart.w(Reg.IIR_FCR, fcr)
    uart.w(Reg.IER, 0x01)
    for count in range(1, 17):
        receive(uart, b"x")
        assert irq(uart) is (count >= trigger)
    assert uart.device.room("rx") == 0


def test_a_short_burst_times_out_after_four_characters() -> None:
    uart = make()
    uart.w(Reg.IIR_FCR, 0xC1)
    uart.w(Reg.IER, 0x01)
    receive(uart, b"ls")
    uart.advance(4 * CHARACTER_NS - 1000)
    assert not irq(uart)
    assert uart.r(Reg.IIR_FCR) == 0xC1
    uart.advance(2000)
    assert irq(uart)
    assert uart.r(Reg.IIR_FCR) == 0xCC
    assert uart.r(Reg.DATA) == ord("l")
    assert not irq(uart), "reading clears the time-out and restarts the timer"
    uart.advance(4 * CHARACTER_NS + 1000)
    assert irq(uart)
    assert uart.r(Reg.DATA) == ord("s")
    uart.advance(1_000_000_000)
    assert uart.r(Reg.IIR_FCR) == 0xC1


def test_each_character_restarts_the_time_out() -> None:
    uart = make()
    uart.w(Reg.IIR_FCR, 0xC1)
    uart.w(Reg.IER, 0x01)
    for _ in range(5):
        receive(uart, b"x")
        uart.advance(3 * CHARACTER_NS)
        assert not irq(uart)
    uart.advance(CHARACTER_NS + 1000)
    assert irq(uart)


def test_time_out_needs_a_fifo_and_the_interrupt_enabled() -> None:
    uart = make()
    uart.w(Reg.IIR_FCR, 0xC1)
    receive(uart, b"x")
    uart.advance(1_000_000_000)
    assert uart.wiring.timers == {}
    uart.w(Reg.IER, 0x01)  # the characters are old: at once
    uart.advance(0)
    assert uart.r(Reg.IIR_FCR) == 0xCC


def test_input_waits_while_there_is_no_room() -> None:
    uart = make()
    assert uart.device.room("rx") == 1
    receive(uart, b"x")
    assert uart.device.room("rx") == 0
    uart.w(Reg.IIR_FCR, 0x07)
    assert uart.device.room("rx") == 16
    uart.w(Reg.MCR, 0x10)
    assert uart.device.room("rx") == 0, "loopback disconnects the line"


def test_without_fifo_an_overrun_keeps_the_newer_character() -> None:
    uart = make(mcr=0x10)
    uart.w(Reg.DATA, 1)
    uart.w(Reg.DATA, 2)
    assert uart.r(Reg.LSR) == 0x63
    assert uart.r(Reg.LSR) == 0x61
    assert uart.r(Reg.DATA) == 2


def test_fifo_clear() -> None:
    uart = make()
    uart.w(Reg.IIR_FCR, 0x01)
    receive(uart, b"abc")
    uart.w(Reg.IIR_FCR, 0x03)
    assert uart.r(Reg.LSR) == 0x60


def test_out2_gates_the_interrupt() -> None:
    uart = make(mcr=0x03)
    uart.w(Reg.IER, 0x02)
    assert not irq(uart)
    uart.w(Reg.MCR, 0x0B)
    assert irq(uart)
    uart.w(Reg.MCR, 0x1B)
    assert not irq(uart)


def test_linux_8250_autoconfig_finds_a_16550a() -> None:
    """The questions of drivers/tty/serial/8250/8250_port.c, autoconfig() and autoconfig_16550a()."""
    uart = Rig(Uart16550, "regs")
    uart.w(Reg.IER, 0)
    assert uart.r(Reg.IER) & 0x0F == 0
    uart.w(Reg.IER, 0xFF)
    assert uart.r(Reg.IER) == 0x0F
    uart.w(Reg.IER, 0)
    uart.w(Reg.MCR, 0x10 | 0x0A)
    assert uart.r(Reg.MSR) & 0xF0 == 0x90
    uart.w(Reg.MCR, 0)
    uart.w(Reg.LCR, 0xBF)
    uart.w(2, 0)  # EFR of better chips
    uart.w(Reg.LCR, 0)
    uart.w(Reg.IIR_FCR, 0x01)
    assert uart.r(Reg.IIR_FCR) >> 6 == 3
    for lcr in (0x80, 0xBF):
        uart.w(Reg.LCR, lcr)
        assert uart.r(2) != 0, "would be taken for an EFR"
    status = []
    for lcr in (0, 0x80):  # 64-byte FIFO of a TI16750
        uart.w(Reg.LCR, lcr)
        uart.w(Reg.IIR_FCR, 0x21)
        status.append(uart.r(Reg.IIR_FCR) >> 5)
    assert status == [6, 6]
    uart.w(Reg.LCR, 0)
    uart.w(Reg.IER, 0x40)  # UUE of an XScale
    assert uart.r(Reg.IER) & 0x40 == 0


def test_loopback() -> None:
    uart = make(mcr=0x10)
    uart.w(Reg.DATA, 0xA5)
    assert uart.wiring.sent == []
    assert uart.r(Reg.LSR) == 0x61
    assert uart.r(Reg.DATA) == 0xA5
    lines = {}
    for mcr in (0x11, 0x12, 0x14, 0x18):
        uart.w(Reg.MCR, mcr)
        lines[mcr] = uart.r(Reg.MSR) & 0xF0
    assert lines == {0x11: 0x20, 0x12: 0x10, 0x14: 0x40, 0x18: 0x80}


def test_modem_status_deltas_clear_when_read() -> None:
    uart = make(mcr=0x1F)
    uart.r(Reg.MSR)
    uart.w(Reg.IER, 0x08)
    uart.w(Reg.MCR, 0x10)  # all four lines fall; RI's trailing edge counts
    assert uart.r(Reg.IIR_FCR) == 0x00
    assert uart.r(Reg.MSR) == 0x0F
    assert uart.r(Reg.MSR) == 0x00
    uart.w(Reg.MCR, 0x14)  # RI rises: no delta bit
    assert uart.r(Reg.MSR) == 0x40


def test_divisor_latch() -> None:
    uart = make()
    uart.w(Reg.LCR, 0x83)
    uart.w(Reg.DATA, 0x34)
    uart.w(Reg.IER, 0x12)
    assert (uart.r(Reg.DATA), uart.r(Reg.IER)) == (0x34, 0x12)
    uart.w(Reg.LCR, 0x03)
    assert (uart.r(Reg.DATA), uart.r(Reg.IER)) == (0, 0)
    assert uart.wiring.sent == []


def test_lsr_leaves_the_mirror_while_reading_it_matters() -> None:
    uart = make()
    assert uart.device.mirror()["regs", Reg.LSR] == 0x60
    uart.w(Reg.MCR, 0x10)
    assert ("regs", Reg.LSR) not in uart.device.mirror()
    uart.w(Reg.DATA, 1)
    uart.w(Reg.DATA, 2)
    uart.w(Reg.MCR, 0x0B)
    assert ("regs", Reg.LSR) not in uart.device.mirror()
    uart.r(Reg.LSR)
    assert uart.device.mirror()["regs", Reg.LSR] == 0x61
