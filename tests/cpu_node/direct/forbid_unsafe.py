"""Takes system calls away from this process and all it starts, as containers do: they fail with EPERM.

    python -m tests.cpu_node.direct.forbid_unsafe ptrace,seccomp command...
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

NUMBERS = {"ptrace": 101, "seccomp": 317}
PRCTL, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 157, 38, 22, 2
LOAD, EQUAL, ANSWER = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF_0000, 0x0005_0000


def forbid(names: list[str]) -> None:
    """For good. Descendants inherit it."""
    numbers = [NUMBERS[name] for name in names]
    rows = [(LOAD, 0, 0, 0)]
    rows += [(EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    rows += [(ANSWER, 0, 0, ALLOW), (ANSWER, 0, 0, FAIL | errno.EPERM)]
    code = b"".join(struct.pack("<HBBI", *row) for row in rows)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("<HxxxxxxQ", len(rows), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, FILTER, program, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid([name for name in sys.argv[1].split(",") if name])
    os.execv(sys.argv[2], sys.argv[2:])
