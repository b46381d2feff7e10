"""A process that runs cases, and the handle that its parent holds.

`python -m tests.insn.worker KIND` reads pickled lists of cases from standard input and writes a pickled
list of outcomes for each.  Native and translated runs install handlers for the same signals, and a wild
case can end its process: so each kind has its own process, and the parent starts a new one when it died.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import struct
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from tests.insn.state import Case, CpuState, Stop

NATIVE, TRANSLATED, SIMULATED = "native", "translated", "simulated"
ANSWER_SECONDS = 60.0
ROOT = Path(__file__).parents[2]


class Runner(Protocol):
    def run(self, case: Case) -> CpuState: ...


def make_runner(kind: str) -> Runner:
    if kind == NATIVE:
        from tests.insn.native_unsafe import NativeRunner

        return NativeRunner()
    if kind in (TRANSLATED, SIMULATED):
        from tests.insn.translated import TranslatedRunner

        return TranslatedRunner(simulate=kind == SIMULATED)
    raise ValueError(f"unknown kind of runner: {kind}")


def _send(stream: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> object:
    header = stream.read(4)
    if len(header) < 4:
        raise EOFError
    data = stream.read(struct.unpack("<I", header)[0])
    return pickle.loads(data)


class WorkerError(Exception):
    """The process cannot run anything."""


class Worker:
    """Cases in, outcomes out, whatever a case does to the process.  Use as a context manager."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: list[Case] = []

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end()

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was still buffered for a dead process
                    stream.close()
        return process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.insn.worker", self._kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout is not None
        try:
            _receive(process.stdout)
        except EOFError:
            status = process.wait()
            self._end()
            raise WorkerError(f"the {self._kind} worker did not start: status {status}") from None
        return process

    def send(self, cases: Sequence[Case]) -> None:
        """Starts on the cases; `receive` must follow before the next send."""
        self._waiting = list(cases)
        process = self._process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive() finds out
            _send(process.stdin, self._waiting)

    def receive(self, deadline_seconds: float = ANSWER_SECONDS) -> list[CpuState]:
        """The outcomes of the cases sent.  A case that ends the process has stop kind "crashed", one that
        keeps it for too long has "hung"."""
        cases, self._waiting = self._waiting, []
        answer = self._answer(deadline_seconds)
        if isinstance(answer, list):
            return answer
        if len(cases) == 1:
            return [CpuState(answer)]
        out = []
        for case in cases:  # one of them did it: find out which
            self.send([case])
            out += self.receive(deadline_seconds / 10)
        return out

    def run(self, case: Case) -> CpuState:
        self.send([case])
        return self.receive()[0]

    def _answer(self, deadline_seconds: float) -> list[CpuState] | Stop:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], deadline_seconds)
        if not ready:
            self._end()
            return Stop("hung")
        try:
            answer = _receive(process.stdout)
        except EOFError:
            status = process.wait()
            self._end()
            return Stop("crashed", error=status)
        assert isinstance(answer, list)
        return answer


def serve(kind: str) -> None:
    """Child side: until standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a print must not garble the answers
    runner = make_runner(kind)
    _send(answers, "ready")
    while True:
        try:
            cases = _receive(requests)
        except EOFError:
            return
        assert isinstance(cases, list)
        _send(answers, [_run(runner, case) for case in cases])


def _run(runner: Runner, case: Case) -> CpuState:
    """A Python exception is an outcome too: it says which case, and where."""
    try:
        return runner.run(case)
    except Exception as exc:
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return CpuState(Stop(f"{type(exc).__name__} at {where}: {exc}"))


if __name__ == "__main__":
    serve(sys.argv[1])
