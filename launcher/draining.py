"""A process that writes a trace file: `python -m launcher.draining FILE FD...`, of launcher/recording.py.

On its standard input come the length (8 bytes) and the msgpack of tracing.file.Meta; then it writes what the
rings get, until that input ends. A full disk ends it, with a line; the machine knows nothing of it.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from launcher.errors import EXIT_DIED, EXIT_OK
from tracing.drain import TURN_S, Drain
from tracing.file import Writer
from tracing.meta import Meta
from tracing.rings import Ring

NICE = 10  # the machine comes first


def main(arguments: Sequence[str]) -> int:
    file, fds = Path(arguments[0]), list(map(int, arguments[1:]))
    os.nice(NICE)
    os.setsid()  # Ctrl-C is for the launcher, which tells us by ending our input
    begin = sys.stdin.buffer
    meta = msgspec.msgpack.decode(begin.read(int.from_bytes(begin.read(8), "little")), type=Meta)
    rings = [Ring(name, fd) for name, fd in zip(meta.rings, fds, strict=True)]
    try:
        with file.open("wb") as out:
            drain = Drain(rings, Writer(out, meta))
            while not select.select([begin], [], [], TURN_S)[0]:
                drain.turn()
            drain.finish()
    except OSError as error:
        print(f"launcher: {file}: the trace ends here: {error.strerror}", file=sys.stderr)
        return EXIT_DIED
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
