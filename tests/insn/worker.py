"""A process that runs cases, and the handle that its parent holds.

`python -m tests.insn.worker NAME` reads pickled lists of cases and families from standard input and writes a
pickled list of outcomes for each.  Executors install handlers for the same signals, and a wild case can end
its process: so each has a process of its own, and the parent starts a new one when it died.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.insn.executors import Runner, make_runner
from tests.insn.low_memory import fixed_addresses
from tests.insn.state import Case, CpuState, Family, Stop

ANSWER_SECONDS = 60.0
ROOT = Path(__file__).parents[2]


def _send(stream: IO[bytes], value: object) -> None:
    _send_packed(stream, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


def _send_packed(stream: IO[bytes], data: bytes) -> None:
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> object:
    header = stream.read(4)
    if len(header) < 4:
        raise EOFError
    data = stream.read(struct.unpack("<I", header)[0])
    return pickle.loads(data)


@dataclass(slots=True)
class Batch:
    """Cases and their families, pickled once for all workers.  Cases are numbered from `first`."""

    cases: list[Case]
    first: int
    packed: bytes

    @classmethod
    def of(cls, items: Iterable[Case | Family], first: int = 0) -> Batch:
        items = list(items)
        return cls(_cases(items), first, pickle.dumps(items, pickle.HIGHEST_PROTOCOL))


def _cases(items: Iterable[Case | Family]) -> list[Case]:
    return [case for item in items for case in (item.cases() if isinstance(item, Family) else [item])]


class WorkerError(Exception):
    """The process cannot run anything."""


class Worker:
    """Cases in, outcomes out, whatever a case does to the process.  Use as a context manager."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: list[Case] = []
        self._skip: frozenset[int] = frozenset()

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
            preexec_fn=fixed_addresses,
        )
        assert process.stdout is not None
        try:
            _receive(process.stdout)
        except EOFError:
            status = process.wait()
            self._end()
            raise WorkerError(f"the {self._kind} worker did not start: status {status}") from None
        return process

    def send(self, cases: Batch | Sequence[Case], skip: frozenset[int] = frozenset()) -> None:
        """Starts on the cases but those whose places are in `skip`; `receive` must follow before the next."""
        batch = cases if isinstance(cases, Batch) else Batch.of(cases)
        self._waiting, self._skip = batch.cases, skip
        process = self._process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive() finds out
            _send(process.stdin, skip)
            _send_packed(process.stdin, batch.packed)

    def receive(self, deadline_seconds: float = ANSWER_SECONDS) -> list[CpuState | None]:
        """The outcomes of the cases sent, None for those skipped.  A case that ends the process has stop kind
        "crashed", one that keeps it for too long has "hung"."""
        cases, skip = self._waiting, self._skip
        self._waiting, self._skip = [], frozenset()
        answer = self._answer(deadline_seconds)
        if isinstance(answer, list):
            return answer
        if len(cases) == 1:
            return [CpuState(answer)]
        out: list[CpuState | None] = []
        for number, case in enumerate(cases):  # one of them did it: find out which
            if number in skip:
                out.append(None)
                continue
            self.send([case])
            out += self.receive(deadline_seconds / 10)
        return out

    def run(self, case: Case) -> CpuState:
        self.send([case])
        (state,) = self.receive()
        assert state is not None
        return state

    def _answer(self, deadline_seconds: float) -> list[CpuState | None] | Stop:
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
            skip, items = _receive(requests), _receive(requests)
        except EOFError:
            return
        assert isinstance(items, list)
        assert isinstance(skip, frozenset)
        cases = enumerate(_cases(items))
        _send(answers, [None if number in skip else _run(runner, case) for number, case in cases])


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
