"""Debian's kernel to a shell, with APICs and with the 8259 only: what a user types there, and how it ends.

One machine of each kind is booted and serves all tests; a test that leaves it unusable costs a second boot.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.drive import Screen, command
from tests.machine.files import linux_machine
from tests.machine.processes import titles

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("guest_files")]

MACHINES = {"apic": "linux.toml", "8259": "linux-pic.toml"}
PARTS = [
    "launcher",
    "forkserver",
    "console",
    "memory",
    "uart0",
    "pic",
    "pit",
    "rtc",
    "kbd",
    "post",
    "pm",
    "cpu0",
]
CTRL_C, UP, LEFT, RIGHT = "\x03", "\x1b[A", "\x1b[D", "\x1b[C"
FORKS = 150
COUNTED = 3000
BURST = 2000
WIDTH = 200  # columns; busybox breaks longer command lines
SLEEP_S = 10
ACCURACY = 0.01
SLEEPS = 20  # attempts
DATE_S = 30  # what a busy host may put between the guest's look at its RTC and its clock
CLOCK_LOOKS = 8
UPTIME_STEP_S = 0.01  # of /proc/uptime, which cuts off


class Computer:
    """A machine that is booted when first asked for, and again if a test has ended it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.name = kind, f"linux-{kind}"
        self.runtime = folder / "run"
        self._file = linux_machine(folder, MACHINES[kind], self.name)
        self._screen: Screen | None = None

    def screen(self) -> Screen:
        if self._screen is None or not self._screen.alive:
            self.close()
            self._screen = Screen("up", self._file, runtime=self.runtime)
            self._screen.prompt()
            self._screen.run(f"stty cols {WIDTH}")
        return self._screen

    def close(self) -> None:
        if self._screen is not None:
            self._screen.__exit__()
            self._screen = None


@pytest.fixture(scope="module", params=MACHINES)
def computer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    machine = Computer(request.param, tmp_path_factory.mktemp("m"))
    yield machine
    machine.close()


@pytest.fixture
def shell(computer: Computer) -> Iterator[Screen]:
    """A shell at its prompt."""
    screen = computer.screen()
    yield screen
    if screen.alive and not screen.at_prompt():
        computer.close()  # the test has failed in the middle of something


def test_it_boots_without_a_complaint(shell: Screen) -> None:
    text = shell.text()
    assert re.search(r"^GUEST-READY \d+\.\d+$", text, re.MULTILINE)
    for bad in (
        "BUG:",
        "Oops",
        "WARNING:",
        "Call Trace",
        "unchecked MSR",
        "soft lockup",
        "Spurious",
        "unstable",
    ):
        assert bad not in text, text


def test_uname_and_cpuinfo(shell: Screen) -> None:
    assert re.fullmatch(r"Linux \S+ \d+\.\d+\.\d+-\d+-686 .*Debian.* i686 GNU/Linux\n", shell.run("uname -a"))
    pairs = (line.split(":", 1) for line in shell.run("cat /proc/cpuinfo").splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    assert info["vendor_id"] == "GenuineIntel"
    assert info["cpu family"] == "6"
    assert {"fpu", "tsc", "cx8", "sep", "pge", "cmov", "mmx", "sse", "sse2", "sse4_2"} <= set(
        info["flags"].split()
    )
    assert not {"avx", "xsave", "lm", "pae"} & set(info["flags"].split())


def test_interrupts_come_from_the_controller_of_the_machine(computer: Computer, shell: Screen) -> None:
    lines = shell.run("cat /proc/interrupts").splitlines()
    rows = {words[0]: words[1:] for line in lines if (words := line.split()) and words[0].endswith(":")}
    controller = {"apic": "IO-APIC", "8259": "XT-PIC"}[computer.kind]
    for irq, name in (("0:", "timer"), ("1:", "i8042"), ("4:", "ttyS0"), ("8:", "rtc0"), ("9:", "acpi")):
        assert rows[irq][1] == controller, lines
        assert rows[irq][-1] == name
    assert int(rows["0:"][0]) > 0
    assert int(rows["4:"][0]) > 0
    ticks = {"apic": "LOC:", "8259": "0:"}[computer.kind]
    before = int(rows[ticks][0])
    assert int(shell.run(f"sleep 1; grep '{ticks}' /proc/interrupts").split()[1]) > before
    assert int(rows["ERR:"][0]) == 0


def test_ports_belong_to_drivers(shell: Screen) -> None:
    ports = dict(
        re.findall(r"^ *([0-9a-f]{4}-[0-9a-f]{4}) : (.*)$", shell.run("cat /proc/ioports"), re.MULTILINE)
    )
    expected = {
        "0020-0021": "pic1",
        "0040-0043": "timer0",
        "0060-0060": "keyboard",
        "0064-0064": "keyboard",
        "0070-0071": "rtc0",
        "00a0-00a1": "pic2",
        "03f8-03ff": "serial",
        "0600-0603": "ACPI PM1a_EVT_BLK",
        "0604-0605": "ACPI PM1a_CNT_BLK",
        "0608-060b": "ACPI PM_TMR",
    }
    assert {key: ports.get(key) for key in expected} == expected
    assert "AT Translated Set 2 keyboard" in shell.run("cat /proc/bus/input/devices")


def test_files_pipes_and_checksums(shell: Screen) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}  -\n", shell.run("ls -lR / 2>/dev/null | md5sum"))
    said = shell.run("dd if=/dev/urandom bs=1M count=8 | md5sum")
    assert re.search(r"^8\+0 records in\n8\+0 records out\n", said, re.MULTILINE), said
    assert re.search(r"^[0-9a-f]{32}  -$", said, re.MULTILINE), said

    zeros = bytes(16 << 20)
    assert shell.run("dd if=/dev/zero bs=1M count=16 2>/dev/null | sha1sum").split() == [sha1(zeros), "-"]
    numbers = "".join(f"{n}\n" for n in range(1, COUNTED + 1)).encode()
    assert shell.run(f"seq 1 {COUNTED} | md5sum").split() == [md5(numbers), "-"]
    long_way = f"seq 1 {COUNTED} | gzip | gunzip | sort -rn | sort -n | sha1sum"
    assert shell.run(long_way).split() == [sha1(numbers), "-"]
    piece = shell.run(f"seq 1 {COUNTED} >/tmp/n; tail -c 1000 /tmp/n | head -c 99 | md5sum")
    assert piece.split() == [md5(numbers[-1000:][:99]), "-"]
    summed = shell.run(f"seq 1 {COUNTED} | awk '{{ s += $1 * 1.5 }} END {{ printf \"%.1f\\n\", s }}'")
    assert summed == f"{sum(n * 1.5 for n in range(1, COUNTED + 1)):.1f}\n"


def test_a_loop_of_forks(shell: Screen) -> None:
    loop = f"i=0; while [ $i -lt {FORKS} ]; do echo line $i | md5sum; i=$((i+1)); done | sha1sum"
    lines = "".join(f"{md5(f'line {n}{chr(10)}'.encode())}  -\n" for n in range(FORKS))
    assert shell.run(loop).split() == [sha1(lines.encode()), "-"]


def test_the_answer_to_the_cursor_query_is_understood(shell: Screen) -> None:
    """A terminal tells where its cursor is, which busybox asks for at each prompt."""
    for pause_s in (1, 5, 25, 125):  # what follows an escape sequence soon is taken for a part of it
        shell.type("\x1b[1;5R")
        time.sleep(pause_s)
        said = shell.run("echo here")
        if said == "here\n":
            break
    assert said == "here\n"


def test_history_and_line_editing(shell: Screen) -> None:
    assert shell.run("echo first $((40+2))") == "first 42\n"
    assert shell.run("echo second $((50+1))") == "second 51\n"
    shell.type(UP + UP + "\n")
    assert shell.result() == "first 42\n"
    shell.type("echo 1xyz" + 3 * LEFT + "\x7f" + RIGHT + "2\n")  # Backspace over the 1, a 2 behind the x
    assert shell.result() == "x2yz\n"
    shell.type("cat /proc/vers\t\n")
    assert "Linux version" in shell.result()


def test_ctrl_c_interrupts(shell: Screen) -> None:
    shell.type("sh -c 'echo begin; exec sleep 1000'\n")  # in the foreground by the time it says so
    shell.wait_for("\r\nbegin\r\n")
    shell.type(CTRL_C)
    shell.wait_for("^C")  # before or behind the line that the shell ends: the signal is sent before the echo
    shell.prompt()
    assert shell.run("echo status $?") == "status 130\n"
    shell.type("yes interrupted\n")
    shell.wait_for("\r\ninterrupted\r\ninterrupted\r\n")
    shell.type(CTRL_C)
    shell.prompt()
    assert shell.run("echo status $?") == "status 130\n"


def test_a_burst_of_output_is_whole(shell: Screen) -> None:
    assert shell.run(f"seq 1 {BURST}").split() == [str(n) for n in range(1, BURST + 1)]


def test_a_burst_of_input_is_whole(shell: Screen) -> None:
    """Pasted text: the port's 16 bytes must hold the line up, not lose it."""
    lines = [f"{random.Random(n).getrandbits(200):050x}" for n in range(40)]
    shell.type("echo begin; cat >/tmp/pasted\n")
    shell.wait_for("\r\nbegin\r\n")  # now the terminal is as cat finds it
    for line in lines:
        shell.type(line + "\n")
        shell.wait_for(line)  # its echo
    shell.type("\x04")
    shell.result()
    assert shell.run("md5sum </tmp/pasted").split()[0] == md5("".join(f"{s}\n" for s in lines).encode())


def test_the_clock_runs_right(shell: Screen) -> None:
    """Against the host's. A busy host delays everything: each look at the guest's clock lies between two at
    the host's, and it is looked on until the time passed is long beside that."""

    def guest_minus_host() -> tuple[float, float]:
        """At least and at most."""
        least, most = -math.inf, math.inf
        for _ in range(CLOCK_LOOKS):
            asked = time.monotonic()
            shell.type("read up rest </proc/uptime; echo at $up\n")
            up = float(shell.wait_for(re.compile(rb"\nat (\d+\.\d\d)\r\n"))[1])
            least, most = max(least, up - time.monotonic()), min(most, up + UPTIME_STEP_S - asked)
            shell.prompt()
        return least, most

    def elapsed(seconds: int) -> float:
        said = shell.run(f"read a b </proc/uptime; sleep {seconds}; read c d </proc/uptime; echo $a $c")
        start, end = map(float, said.split())
        return end - start

    start_s, (least_before, most_before) = time.monotonic(), guest_minus_host()
    start_up = min(elapsed(0) for _ in range(CLOCK_LOOKS))  # of a process
    slept = [elapsed(SLEEP_S)]
    while min(slept) - start_up > SLEEP_S * (1 + ACCURACY) and len(slept) < SLEEPS:
        slept.append(elapsed(SLEEP_S))
    slowest, fastest = -1.0, 1.0
    while fastest - slowest > ACCURACY:
        least, most = guest_minus_host()
        passed_s = time.monotonic() - start_s
        slowest, fastest = (least - most_before) / passed_s, (most - least_before) / passed_s
    print(f"guest clock {slowest:+.4%} to {fastest:+.4%} fast, sleep {SLEEP_S}: {slept}, 0: {start_up:.2f}")
    assert fastest > -ACCURACY
    assert slowest < ACCURACY
    assert SLEEP_S * (1 - ACCURACY) <= min(slept) - start_up <= SLEEP_S * (1 + ACCURACY)


def test_the_date_is_the_host_s(shell: Screen) -> None:
    before = time.time()
    guest = int(shell.run("date +%s"))
    assert before - DATE_S <= guest <= time.time() + DATE_S


def test_every_part_is_a_process(computer: Computer, shell: Screen) -> None:
    parts = [part for part in (*PARTS, "ioapic") if part != "ioapic" or computer.kind == "apic"]
    said = "silent"
    while "silent" in said:  # a busy host: some answer later than `ps` waits
        said = command("ps", runtime=computer.runtime)
    rows = {row[0]: row for line in said.splitlines() if (row := line.split())}
    assert set(parts) <= set(rows)
    on_host = titles(computer.name)
    for part in set(parts) - {"launcher", "forkserver"}:
        assert on_host[part] == int(rows[part][1]), part
    assert on_host["fork server"] == int(rows["forkserver"][1])
    assert int(rows["launcher"][1]) == shell.pid
    for part in set(parts) - {"forkserver", "console"}:
        assert int(rows[part][3]) > 0, rows[part]


def test_reboot_starts_again(computer: Computer, shell: Screen) -> None:
    if computer.kind == "apic":
        pytest.skip("one of the two is enough")
    shell.type("reboot -f\n")
    shell.wait_for("reboot: Restarting system")
    shell.wait_for("GUEST-READY")
    shell.prompt()
    assert shell.run("echo again") == "again\n"


def test_poweroff_ends_everything(computer: Computer, shell: Screen) -> None:
    shell.type("poweroff -f\n")
    shell.finish(0)
    assert re.search(rf"{computer.name}: powered off after \d+\.\d s\n", shell.text())
    assert shell.attributes() == shell.attributes_before
    shell.wait_gone()
    assert not titles(computer.name)
    assert not list(computer.runtime.glob("*"))


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
