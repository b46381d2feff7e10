"""One tortured machine from its start to its end, and what was wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import boot
from bench.torture import guest
from bench.torture.blocks import Blocks
from bench.torture.faults import GATHER_S, Faults, Plan
from bench.torture.streams import Stream
from launcher import stats
from launcher.control import NoAnswer
from launcher.rundir import CONTROL

LAUNCHER = str(boot.REPO / ".venv" / "bin" / "launcher")
NAME = "torture"
CONSOLES = ("uart0", "hvc0")
DEVICES = ("uart0", "pic", "ioapic", "pit", "rtc", "kbd", "post", "pm", "disk0", "hvc0", "consoles", "memory")
START_S = 300.0  # bounds on hanging, not expectations
HANG_S = 45.0
WARNING = 4  # of the kernel's levels, and worse
RAW_LINE = re.compile(r"^<(\d+)>")
KNOWN = ("was killed by SIGKILL", "powered off", "not shown at log level")  # messages of the launcher
CALM_S = 3.0  # nothing is done, for comparison


class Torture:
    """`faults` has what was wrong, in words; `report` is said while it runs."""

    def __init__(self, load: guest.Load, say: Callable[[str], None]) -> None:
        self.load, self._say = load, say
        self._faults: list[str] = []
        self._stop = threading.Event()
        self.minutes = 0.0
        self.ended = False  # in order
        self.calm_silences: dict[str, float] = {}

    @property
    def wrong(self) -> list[str]:
        """All that was wrong, in the order of its discovery by kind."""
        parts = [self.blocks.faults, *(s.faults for s in self.streams), self.faults.faults, self._faults]
        return [fault for part in parts for fault in part]

    def run(self, plans: Sequence[Plan], minutes: float | None = None) -> None:
        """Start, torture until all plans are done or the time is over, end and look at what is left."""
        with tempfile.TemporaryDirectory(prefix="backplane-") as folder, _runtime() as (runtime, env):
            machine, image = guest.make(Path(folder), self.load, NAME)
            up = [LAUNCHER, "up", "--detach", "--name", NAME, str(machine)]
            if subprocess.run(up, env=env, stdout=subprocess.DEVNULL, check=False).returncode:
                raise SystemExit("torture: the machine did not start")
            self._run_dir = runtime / NAME
            try:
                self._torture(image, plans, minutes)
            finally:
                for stream in self.streams:
                    stream.close()
                subprocess.run([LAUNCHER, "down"], env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, check=False)  # fmt: skip
            self._look_at_log(runtime / f"{NAME}.log")
            if not self.ended and not self.wrong:
                self._faults.append("the machine did not end in order")
            if self.ended:
                self.blocks.finish()
                self._look_at(image)

    def _torture(self, image: Path, plans: Sequence[Plan], minutes: float | None) -> None:
        load, control = self.load, self._run_dir / CONTROL
        self.blocks = Blocks(image, load.blocks, load.seed)
        paths = {name: self._run_dir / f"console-{name}.sock" for name in CONSOLES}
        ready = guest.READY.encode() + b"\n"
        serial = Stream(paths["uart0"], "uart0", load.salt("uart0"), ready)
        virtual = Stream(paths["hvc0"], "hvc0", load.salt("hvc0"), other=self.blocks.take)
        self.streams = (serial, virtual)
        self.faults = Faults(control, NAME, self._stop)
        for stream in self.streams:
            stream.start()
        if not serial.wait_for(b"/ # ", START_S):
            raise SystemExit("torture: the guest does not come to its shell")
        serial.type(guest.COMMAND.encode())
        if not self._until(lambda: len(self.blocks.latest) == load.blocks and serial.number > 10, START_S):
            self._dump("the guest's programs did not begin")
            return
        self._say(f"the guest works: {load.blocks} blocks are written")
        self._calm()
        began = time.monotonic()
        self.faults.start(plans)
        self._watch(began, minutes)
        self.minutes = (time.monotonic() - began) / 60
        self._stop.set()
        self.faults.finish()
        if not self.wrong:
            self._end()

    def _calm(self) -> None:
        begin = time.monotonic()
        time.sleep(CALM_S)
        for stream in self.streams:
            self.calm_silences[stream.console] = stream.longest_silence(begin, begin + CALM_S)

    def _watch(self, began: float, minutes: float | None) -> None:
        """Until all faults are done, something is wrong, or the guest stands still."""
        progress = self._progress()
        moved = dict.fromkeys(progress, time.monotonic())
        gathered = said = time.monotonic()
        while self.faults.running and not self.wrong:
            time.sleep(0.1)
            now, before, progress = time.monotonic(), progress, self._progress()
            for name, value in progress.items():
                if value != before[name]:
                    moved[name] = now
                elif now - moved[name] > HANG_S:
                    self._dump(f"{name} has not moved for {HANG_S:g} s")
                    return
            if now - gathered > GATHER_S:
                self.faults.gather()
                gathered = time.monotonic()
            if now - said > 15:
                self._say(self.progress())
                said = now
            if minutes is not None and now - began > 60 * minutes:
                return

    def progress(self) -> str:
        """One line."""
        done = list(self.faults.done)
        kills = sum(f.kind == "kill" for f in done)
        lines = ", ".join(f"{s.console} {s.number} lines out {s.taken} in" for s in self.streams)
        blocks = f"{self.blocks.acknowledged} runs of blocks acknowledged, {self.blocks.checked} blocks found"
        return f"{kills} kills, {len(done) - kills} swaps; {lines}; {blocks}"

    def _progress(self) -> dict[str, int]:
        values = {f"{s.console}, guest to host": s.number for s in self.streams}
        values |= {f"{s.console}, host to guest": s.taken for s in self.streams}
        return {**values, "the checker on disk0": self.blocks.acknowledged}

    def _end(self) -> None:
        """Let the guest's programs come to their ends, and hear its report."""
        for stream in self.streams:
            stream.leave()
        serial = self.streams[0]
        if not self._until(lambda: all(s.ended for s in self.streams), HANG_S):
            self._dump("the lines did not come to their end")
        elif not serial.wait_for(guest.END_REPORT.encode(), START_S):
            self._dump("the guest did not report")
        else:
            text = serial.text.decode(errors="replace").replace("\r", "")
            self._look_at_report(text.rpartition(guest.BEGIN_REPORT)[2].partition(guest.END_REPORT)[0])
            self.ended = self._until(lambda: not self._run_dir.exists(), START_S)

    def _look_at_report(self, report: str) -> None:
        head, *messages = report.strip().splitlines()
        self._say(f"guest: {head}")
        if not head.startswith("blocks 0, umount 0, rounds of files "):
            self._faults.append(f"guest: {head}")
        for line in messages:
            level = RAW_LINE.match(line)
            if level is None or int(level[1]) & 7 <= WARNING:
                self._faults.append(f"kernel: {line}")

    def _look_at(self, image: Path) -> None:
        found = guest.fsck(image)
        if found is None:
            self._say("no e2fsck on this host")
        elif not found[0]:
            self._faults.append(f"e2fsck: {found[1]}")
        else:
            self._say(f"e2fsck -fn: {found[1].splitlines()[-1]}")

    def _look_at_log(self, log: Path) -> None:
        """The launcher's messages: nothing but what we have killed."""
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            if not any(known in line for known in KNOWN):
                self._faults.append(f"log: {line}")

    def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            if self.wrong:
                return False
            time.sleep(0.02)
        return condition()

    def _dump(self, what: str) -> None:
        """A hang: which devices were last disturbed, and what all processes say of themselves."""
        self._stop.set()
        last = ", ".join(f"{f.kind} {f.device}" for f in self.faults.done[-6:])
        self._faults.append(f"{what}; the last faults: {last}; {self.progress()}")
        try:
            rows = stats.gather(self._run_dir)
        except NoAnswer as error:
            self._say(str(error))
            return
        self._say(stats.text(NAME, rows))
        boot.SCRATCH.mkdir(parents=True, exist_ok=True)
        file = boot.SCRATCH / "torture-hang.json"
        file.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")
        self._say(f"all counters are in {file}")


@contextlib.contextmanager
def _runtime() -> Iterator[tuple[Path, dict[str, str]]]:
    with tempfile.TemporaryDirectory(prefix="backplane-") as folder:
        yield Path(folder), {**os.environ, "BACKPLANE_RUNTIME_DIR": folder}
