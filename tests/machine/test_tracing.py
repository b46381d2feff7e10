"""Recording from outside: files, formats, switches, crashes, and readers that go away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.recorder import ACCESS, MARK, PROCESS, VECTOR, WRITE
from tests.machine.drive import ROOT, Screen, command, environment
from tests.machine.processes import titles
from tracing.file import Trace
from tracing.records import Record

pytestmark = pytest.mark.machine
HELLO = ROOT / "machines" / "hello.toml"
LAUNCHER = ROOT / ".venv" / "bin" / "launcher"
THR = 0x3F8


def read(path: Path) -> list[tuple[str, Record]]:
    with Trace(path) as trace:
        found = [(trace.meta.rings[ring], record) for ring, record in trace.records()]
        assert not trace.complaints
        assert not trace.lost
    return found


def printed(records: list[tuple[str, Record]]) -> bytes:
    """What the guest wrote to its serial port."""
    return bytes(r.two for _, r in records if r.kind == ACCESS and r.one == THR and r.flags & WRITE)


@pytest.fixture
def hello(runtime: Path) -> Iterator[Screen]:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("q powers off")
        yield screen
        if screen.alive:
            screen.type("q")
            screen.finish(0)


def test_all_of_a_machine_s_life_in_a_file(runtime: Path, tmp_path: Path) -> None:
    file = tmp_path / "life.bptrace"
    with Screen("up", HELLO, "--trace", file, runtime=runtime) as screen:
        screen.wait_for("q powers off")
        screen.type("q")
        screen.finish(0)
        screen.wait_gone()
    records = read(file)
    assert b"tick 5" in printed(records)
    kinds = Counter((ring, record.kind) for ring, record in records)
    assert kinds["cpu0.io", VECTOR] == kinds["pic", MARK] > 50


def test_the_flight_recorder_knows_what_was(hello: Screen, runtime: Path, tmp_path: Path) -> None:
    file = tmp_path / "flight.bptrace"
    assert re.fullmatch(r"hello: .*flight.bptrace, 0\.\d MiB\n",
                        command("trace", "hello", "--out", file, runtime=runtime))  # fmt: skip
    assert b"tick 5" in printed(read(file))


def test_it_is_switched_while_the_machine_runs(hello: Screen, runtime: Path, tmp_path: Path) -> None:
    def accesses() -> int:
        file = tmp_path / "now.bptrace"
        command("trace", "hello", "--out", file, runtime=runtime)
        return sum(record.kind == ACCESS for _, record in read(file))

    assert "not recording" in command("trace", "hello", "--off", runtime=runtime)
    hello.type("a")
    hello.wait_for("a")
    before = accesses()
    hello.type("bcd")
    hello.wait_for("bcd")
    assert accesses() == before
    assert "hello: recording" in command("trace", "hello", "--on", runtime=runtime)
    hello.type("efg")
    hello.wait_for("efg")
    assert accesses() >= before + 6  # LSR and THR of each


def test_a_machine_whose_recorder_is_off_from_the_start(runtime: Path, tmp_path: Path) -> None:
    machine = tmp_path / "hello.toml"
    text = HELLO.read_text().replace('source = "', f'source = "{HELLO.parent}/')
    machine.write_text(text.replace("[machine]\n", "[machine]\ntrace = false\n"))
    with Screen("up", machine, runtime=runtime) as screen:
        screen.wait_for("tick 2")
        file = tmp_path / "off.bptrace"
        command("trace", "hello", "--out", file, runtime=runtime)
        assert {record.kind for _, record in read(file)} == {PROCESS}
        screen.wait_for("q powers off")
        command("trace", "hello", "--on", runtime=runtime)
        screen.type("later")
        screen.wait_for("later")
        command("trace", "hello", "--out", file, runtime=runtime)
        assert b"later" in printed(read(file))


def test_a_crash_is_saved_with_what_led_to_it(runtime: Path) -> None:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("tick 2")
        pid = titles("hello")["uart0"]
        os.kill(pid, signal.SIGKILL)
        screen.wait_for("what led to it: ")
        file = Path(screen.wait_for(re.compile(rb"(\S+\.bptrace)"))[1].decode())
        screen.wait_for("q powers off")
        screen.type("q")
        screen.finish(0)
    records = read(file)
    assert b"tick 2" in printed(records)
    assert pid in [record.number for ring, record in records if ring == "uart0" and record.kind == PROCESS]
    with Trace(file) as trace:
        assert f"uart0 (pid {pid}) was killed" in trace.meta.why


def test_a_kill_by_command_is_no_crash(hello: Screen, runtime: Path) -> None:
    command("kill", "hello", "uart0", runtime=runtime)
    hello.type("xyz")
    hello.wait_for("xyz")
    assert not list(runtime.glob("*.bptrace"))


def test_a_swapped_device_goes_on_in_its_ring(hello: Screen, runtime: Path, tmp_path: Path) -> None:
    command("swap", "hello", "uart0", runtime=runtime)
    hello.type("more")
    hello.wait_for("more")
    file = tmp_path / "swapped.bptrace"
    command("trace", "hello", "--out", file, runtime=runtime)
    of_uart = [record for ring, record in read(file) if ring == "uart0"]
    begins = [n for n, record in enumerate(of_uart) if record.kind == PROCESS]
    assert len(begins) == 2
    assert len({of_uart[n].number for n in begins}) == 2
    assert begins[1] < len(of_uart) - 1


@pytest.mark.parametrize("how", ["text", "pcapng"])
def test_a_reader_that_goes_away_is_not_noticed(hello: Screen, runtime: Path, how: str) -> None:
    follow = [LAUNCHER, "trace", "hello", "--follow", "--format", how]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, env=environment(runtime)) as process:
        assert process.stdout is not None
        assert process.stdout.read(4096)
        process.stdout.close()
        assert process.wait(60) == 141
    hello.type("still there")
    hello.wait_for("still there")


def test_a_reader_that_stands_still_is_not_noticed(hello: Screen, runtime: Path) -> None:
    follow = [LAUNCHER, "trace", "hello", "--follow"]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, env=environment(runtime)) as process:
        os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
        time.sleep(2)  # nobody reads: the pipe is full, and so it stays
        hello.type("still there")
        hello.wait_for("still there")
        process.kill()


def test_a_full_disk_ends_the_trace_alone(hello: Screen, runtime: Path) -> None:
    line = command("trace", "hello", "--format", "raw", "--out", "/dev/full", runtime=runtime, check=False)
    assert "the trace ends here: No space left on device" in line
    hello.type("still there")
    hello.wait_for("still there")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["hello", "--out", "x.zip"], "x.zip: its name says no format; end it in .bptrace"),
        (["hello", "--devices", "uart9", "--out", "x.txt"], "hello: has no device 'uart9'; it has "),
        (["hello", "--ports", "3f8-3g0"], "'3f8-3g0' is no port, write it like 3f8 or 3f8-3ff"),
        (["hello", "--ports", "60-20"], "'60-20' ends before it begins"),
        (["hello", "--follow", "--format", "perfetto"], "perfetto can't be followed"),
        (["hello", "--out", "/nowhere/x.txt"], "/nowhere/x.txt: cannot be written"),
        (["nobody", "--out", "x.txt"], "nobody: no machine of this name is running"),
        (["nothing.bptrace", "--out", "x.txt"], "nothing.bptrace: No such file or directory"),
        ([HELLO, "--out", "x.txt"], "hello.toml: no trace file of version 1"),
        (["hello", "--out", "x.txt", "--symbols", HELLO], "hello.toml"),
    ],
)
def test_bad_input(hello: Screen, runtime: Path, arguments: list[object], line: str) -> None:
    process = subprocess.run([LAUNCHER, "trace", *map(str, arguments)], env=environment(runtime), text=True,
                             capture_output=True, cwd=runtime, timeout=60)  # fmt: skip
    assert process.returncode == 2
    assert line in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(runtime.glob("x.*"))
