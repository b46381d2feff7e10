"""The launcher's smaller parts: sizes, host facts, run directories, cores, the counter's frequency, words."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bus.frames import Event
from launcher.affinity import CoreLoad, dialogue_cores, idle_ticks
from launcher.checks import HostFacts, available_bytes, check_host, check_memory
from launcher.config import parse_size, read_config
from launcher.entries import EntryPoints, Preload
from launcher.errors import ConfigError
from launcher.forkserver import ChildSpec, ForkServer
from launcher.journal import Journal
from launcher.plan import child_specs, make_plan
from launcher.report import cpu_state_lines, last_line, process_state, ps_row, table
from launcher.rundir import RunDir, remove_if_dead, running_machines, runtime_root
from launcher.session import first_translation
from launcher.tsc_unsafe import TscClock
from tests.launcher.conftest import machine_text, wait_until

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("16M", 16 * MIB), ("1G", 1 << 30), ("4096K", 4 * MIB), ("512MiB", 512 * MIB), (4096, 4096)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.5G", "16 T", "16m", 1.5, True, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_paths_are_relative_to_the_machine_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    text = machine_text(
        boot='kind = "linux"\nkernel = "../k"\ninitrd = "/abs/i"', rest='[memory]\nfile = "ram"\n'
    )
    text += '[[device]]\nname = "d"\ntype = "dev/my.py:My"\n'
    (tmp_path / "sub" / "m.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = read_config(Path("sub/m.toml"), name="other")
    assert config.machine.name == "other"
    assert config.boot.kernel == tmp_path / "k"  # type: ignore[union-attr]
    assert config.boot.initrd == Path("/abs/i")  # type: ignore[union-attr]
    assert config.memory.file == tmp_path / "sub" / "ram"
    assert config.devices[-1].type == f"{tmp_path}/sub/dev/my.py:My"


# ---- host ---------------------------------------------------------------------------------------


def test_this_hosts_facts() -> None:
    facts = HostFacts.of_this_host()
    check_host(facts)
    assert 64 * MIB < facts.memory_available < 1 << 50
    assert available_bytes("MemTotal: 9 kB\nMemAvailable:  123 kB\n") == 123 * 1024


def test_memory_that_the_host_just_has(machine_file: Path) -> None:
    config = read_config(machine_file)
    check_memory(config, HostFacts("x86_64", 2, 80 * MIB))
    with pytest.raises(ConfigError):
        check_memory(config, HostFacts("x86_64", 2, 80 * MIB - 1))


def test_the_idlest_core_is_chosen() -> None:
    stat = "cpu  9 9 9 9 9\ncpu0 1 2 3 100 7 0 0\ncpu1 1 2 3 300 0 0 0\nintr 5\n"
    assert idle_ticks(stat) == {0: 107, 1: 300}
    load = CoreLoad()
    assert load.idlest({0}) == 0
    assert dialogue_cores("any", load) == ()
    assert dialogue_cores(3, load) == (3,)
    assert set(dialogue_cores("auto", load)) < os.sched_getaffinity(0) or len(os.sched_getaffinity(0)) == 1


def test_the_counters_frequency_agrees_with_itself() -> None:
    first, second = TscClock().frequency_hz(), TscClock().frequency_hz()
    assert first > 100_000_000
    assert abs(first - second) < first // 1000


# ---- run directory ------------------------------------------------------------------------------


def test_runtime_root_by_environment() -> None:
    assert runtime_root({"BACKPLANE_RUNTIME_DIR": "/x", "XDG_RUNTIME_DIR": "/y"}) == Path("/x")
    assert runtime_root({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/backplane")
    assert runtime_root({}) == Path(f"/tmp/backplane-{os.getuid()}")


def test_run_directory_is_private_locked_and_removed(runtime: Path) -> None:
    first = RunDir.create("m", "memory.sock")
    assert first.path == runtime / "m"
    assert first.path.stat().st_mode & 0o777 == 0o700
    assert running_machines() == [first.path]
    with pytest.raises(ConfigError, match="a machine named 'm' is running"):
        RunDir.create("m", "memory.sock")
    other = RunDir.create("n", "memory.sock")
    (first.path / "cpu0.ipc").write_text("")
    first.remove()
    assert running_machines() == [other.path]
    other.remove()
    assert list(runtime.iterdir()) == []


def test_a_dead_machines_directory_is_emptied(runtime: Path) -> None:
    (runtime / "m" / "deep").mkdir(parents=True)
    (runtime / "m" / "lock").write_text("1")
    (runtime / "m" / "deep" / "file").write_text("")
    run_dir = RunDir.create("m", "memory.sock")
    assert [p.name for p in run_dir.path.iterdir()] == ["lock"]
    run_dir.remove()
    (runtime / "m").mkdir()
    (runtime / "m" / "lock").write_text("1")
    assert remove_if_dead(runtime / "m")
    assert list(runtime.iterdir()) == []


# ---- fork server --------------------------------------------------------------------------------


def spec(tmp_path: Path, entry: str, **config: object) -> ChildSpec:
    return ChildSpec(
        "node", f"tests.launcher.test_parts.{entry}", {"machine": "m", **config}, "title", tmp_path / "log"
    )


def exits_with(config: dict[str, int]) -> None:
    print("printed", flush=True)
    raise SystemExit(config["status"])


def sleeps(config: dict[str, int]) -> None:
    time.sleep(3600)


def looks(config: dict[str, int]) -> None:
    """What a child inherits: no descriptor but the standard three, SIGINT ignored, a session of its own."""
    fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    print(fds[:-1], signal.getsignal(signal.SIGINT) == signal.SIG_IGN, os.getsid(0) == os.getpid())
    print(Path("/proc/self/cmdline").read_text().rstrip("\0"), Path("/proc/self/comm").read_text().strip())


def test_children_report_their_status(tmp_path: Path) -> None:
    server = ForkServer.start(Preload(("tests.launcher.test_parts",)))
    try:
        for status in (0, 3):
            child = server.fork(spec(tmp_path, "exits_with", status=status))
            assert os.waitstatus_to_exitcode(server.wait_status(child, 240.0) or 0) == status
            os.close(child.pidfd)
        child = server.fork(spec(tmp_path, "sleeps"))
        assert server.wait_status(child, 0.0) is None
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        assert server.wait_status(child, 240.0) == signal.SIGKILL
    finally:
        server.stop()
        server.stop()
    assert (tmp_path / "log").read_text() == "printed\nprinted\n"


def test_what_children_inherit(tmp_path: Path) -> None:
    server = ForkServer.start(Preload(("tests.launcher.test_parts",)))
    try:
        child = server.fork(spec(tmp_path, "looks"))
        server.wait_status(child, 240.0)
    finally:
        server.stop()
    assert (tmp_path / "log").read_text() == "[0, 1, 2] True True\ntitle node\n"


def test_children_end_with_the_fork_server(tmp_path: Path) -> None:
    server = ForkServer.start(Preload(("tests.launcher.test_parts",)))
    child = server.fork(spec(tmp_path, "sleeps"))
    server.stop()
    wait_until(lambda: process_state(child.pid)[0] in ("gone", "ended"), "the child ends")


AHEAD = Preload((), "tests.launcher.test_parts")


def process_ahead(server: ForkServer) -> int:
    """Its pid, once it is there."""

    def found() -> list[int]:
        pids = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        return [int(pid) for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "ahead\n"]

    wait_until(lambda: bool(found()), "a process forked ahead")
    return found()[0]


def test_the_child_forked_ahead_is_as_the_others(tmp_path: Path) -> None:
    server = ForkServer.start(AHEAD)
    try:
        pid = process_ahead(server)
        first, second = (server.fork(spec(tmp_path, "looks")) for _ in range(2))
        assert first.pid == pid != second.pid
        for child in (first, second):
            assert server.wait_status(child, 30.0) == 0
            os.close(child.pidfd)
    finally:
        server.stop()
    assert (tmp_path / "log").read_text() == 2 * "[0, 1, 2] True True\ntitle node\n"


def test_a_child_forked_ahead_and_killed_is_replaced(tmp_path: Path) -> None:
    server = ForkServer.start(AHEAD)
    try:
        pid = process_ahead(server)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process_state(pid)[0] in ("gone", "ended"), "it ends")
        child = server.fork(spec(tmp_path, "exits_with", status=3))
        assert child.pid != pid
        assert os.waitstatus_to_exitcode(server.wait_status(child, 30.0) or 0) == 3
    finally:
        server.stop()


def test_a_child_forked_ahead_whose_module_does_not_import_says_so(tmp_path: Path) -> None:
    server = ForkServer.start(Preload((), "tests.launcher.nothing"))
    try:
        entry = "tests.launcher.nothing.run"
        child = server.fork(ChildSpec("node", entry, {"machine": "m"}, "title", tmp_path / "log"))
        assert os.waitstatus_to_exitcode(server.wait_status(child, 30.0) or 0) == 1
    finally:
        server.stop()
    assert "No module named 'tests.launcher.nothing'" in (tmp_path / "log").read_text()


def test_a_child_forked_ahead_ends_with_the_fork_server(tmp_path: Path) -> None:
    server = ForkServer.start(AHEAD)
    pid = process_ahead(server)
    server.stop()
    wait_until(lambda: process_state(pid)[0] in ("gone", "ended"), "it ends")


# ---- plan ---------------------------------------------------------------------------------------


def test_what_the_processes_are_told(machine_file: Path, tmp_path: Path) -> None:
    plan = make_plan(read_config(machine_file))
    memory, (uart, pic, cpu) = child_specs(plan, EntryPoints(), tmp_path, 2_000_000_000, (1,), "info")
    assert memory.entry == "memory_node.node.run"
    assert [r["name"] for r in memory.config["regions"]] == ["ram", "legacy-hole", "apics", "mirror", "code"]
    assert memory.host_cpus == ()
    assert (uart.node, uart.host_cpus, uart.title) == ("uart0", (1,), "backplane fake: uart0")
    assert uart.config["controllers"] == ["pic"]
    assert uart.config["irqs"] == {"intr": 4}
    assert uart.config["mirror_index"] == 0
    assert pic.config["log_level"] == "info"
    assert cpu.config["controllers"] == {"pic": "pic", "ioapics": []}
    assert cpu.config["tsc_hz"] == 2_000_000_000
    assert cpu.config["memory_size"] == 16 * MIB
    assert cpu.config["start"] == plan.boot.start


# ---- words --------------------------------------------------------------------------------------


def test_ps_table() -> None:
    counters = {"frames_in": 12, "frames_out": 3, "latency_p50_ns": 71_400, "latency_p99_ns": 25_000_000}
    rows = [ps_row("cpu0", os.getpid(), counters), ps_row("launcher", os.getpid(), None)]
    rows[1] |= {"restarts": 2, "swaps": 7}
    lines = table(rows).splitlines()
    assert lines[0].split() == [
        "NODE",
        "PID",
        "STATE",
        "FRAMES",
        "IN",
        "OUT",
        "P50",
        "P99",
        "CPU",
        "RESTARTS",
        "SWAPS",
    ]
    assert lines[1].split()[:9] == ["cpu0", str(os.getpid()), "running", "12", "3", "71", "us", "25", "ms"]
    assert lines[2].split()[3:7] == ["-", "-", "-", "-"]
    assert lines[2].split()[-2:] == ["2", "7"]


def test_state_of_a_process() -> None:
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        wait_until(lambda: process_state(sleeper.pid)[0] == "waiting", "it sleeps")
        sleeper.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(sleeper.pid)[0] == "stopped", "it stops")
    finally:
        sleeper.kill()
        sleeper.wait()
    assert process_state(sleeper.pid) == ("gone", 0.0)


def test_last_line_of_a_log(tmp_path: Path) -> None:
    assert last_line(tmp_path / "none") == ""
    (tmp_path / "log").write_bytes(b"x" * 10_000 + b"\nfirst\n  the \t last\n\n")
    assert last_line(tmp_path / "log") == "the last"


def test_cpu_state_in_words() -> None:
    state = {"note": "x", "eip": 0x100000, "eax": 1, "cr0": 0x11, "halted": False}
    state |= {"dr": [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400], "idt": [0x5000, 0x17F]}
    state |= {"cs": [0x10, 0, 0xFFFFFFFF, 0xC09B, True], "ldtr": [0, 0, 0, 0x82, False]}
    assert list(cpu_state_lines(state)) == [
        "eax=00000001",
        "eip=00100000",
        "cr0=00000011",
        "cs=0010 base=00000000 limit=ffffffff rights=c09b",
        "ldtr=0000 base=00000000 limit=00000000 rights=0082 unusable",
        "idt base=00005000 limit=017f",
        "dr0=00000000 dr1=00000000 dr2=00000000 dr3=00000000 dr6=ffff0ff0 dr7=00000400",
        "note=x",
        "halted=False",
    ]


def test_journal_levels_and_repetition(capfd: pytest.CaptureFixture[str]) -> None:
    journal = Journal("m", "info")
    for _ in range(3):
        journal.event("cpu0", Event("open-bus", "read of\nport 1"))
    journal.event("cpu0", Event("log", "quiet", {"level": "debug"}))
    journal.tell("one\ntwo")
    assert capfd.readouterr().err == "m: cpu0: open-bus: read of port 1\nm: one\nm: two\n"
    assert journal.hidden() == "1 log"


def test_the_first_start_is_announced(tmp_path: Path) -> None:
    """Only where translations are kept, and none are there yet."""
    (tmp_path / "k").touch()
    file = tmp_path / "machine.toml"
    text = '[machine]\nname = "m"\nmemory = "64M"\n[boot]\nkind = "linux"\nkernel = "k"\n'

    def line(cpu: str) -> str | None:
        file.write_text(f"{text}[cpu]\n{cpu}\n")
        return first_translation(read_config(file))

    assert line('translations = "off"') is None
    assert str(tmp_path / "kept") in (line('translations = "./kept"') or "")
    (tmp_path / "kept" / "version").mkdir(parents=True)
    (tmp_path / "kept" / "version" / "1.kept").touch()
    assert line('translations = "./kept"') is None
