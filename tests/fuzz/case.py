"""What the bytes of a fuzzing input mean: how the CPU stands, and what code it is given.

Byte 0: bits that say how (see the names below), byte 1: registers, byte 2: where in its page the code begins;
the rest is the code.  Any bytes are an input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpu_node import mode as modes

HEAD = 3
MAX_CODE = 96
USER, VERIFIED, NO_FPU, CODE16, NOT_FLAT, NEXT_ABSENT, AT_PAGE_END, EMPTY_NEXT = (1 << n for n in range(8))
PAGE = 4096


@dataclass(frozen=True, slots=True)
class FuzzCase:
    """How the CPU stands before `code` runs."""

    user: bool  # CPL 3
    verified: bool  # on a page of code and data
    no_fpu: bool  # CR0.TS
    code16: bool
    not_flat: bool  # DS, ES and SS with a base and a limit, FS with a base
    next_absent: bool  # the page behind the code
    next_zero: bool  # ... holds zeros, otherwise more of the code
    offset: int  # in the page
    registers: int
    code: bytes
    soft: bool = False  # data by the software TLB; no input says so, see `variants`

    @property
    def mode(self) -> int:
        """The code mode that its translations have; some have none."""
        mode = modes.USER if self.user else 0
        mode |= modes.NO_FPU if self.no_fpu else 0
        mode |= modes.CODE16 if self.code16 else 0
        mode |= modes.NOT_FLAT if self.not_flat else 0
        return mode | (modes.SOFT if self.soft else 0)

    @property
    def variants(self) -> tuple[FuzzCase, ...]:
        """The ways in which it is translated: flat code of CPL 3 with a window, and with the software TLB."""
        if not self.user or self.mode & modes.INTERPRETED:
            return (self,)
        return (self, replace(self, soft=True))


def parse(data: bytes) -> FuzzCase:
    """Of any bytes; what is missing is zero."""
    how, registers, place = data[:HEAD].ljust(HEAD, b"\0")
    code = data[HEAD : HEAD + MAX_CODE]
    offset = PAGE - 1 - place % 32 if how & AT_PAGE_END else 16 * place
    return FuzzCase(
        user=bool(how & USER),
        verified=bool(how & VERIFIED),
        no_fpu=bool(how & NO_FPU) and place & 1 == 0,
        code16=bool(how & CODE16) and place & 3 == 0,
        not_flat=bool(how & NOT_FLAT) and place & 3 == 1,
        next_absent=bool(how & NEXT_ABSENT),
        next_zero=bool(how & EMPTY_NEXT),
        offset=min(offset, PAGE - 1),
        registers=registers,
        code=code,
    )


def pages(case: FuzzCase) -> tuple[bytes, bytes]:
    """Contents of the code's page and of the next."""
    first = bytes(case.offset) + case.code
    rest = first[PAGE:]
    following = bytes(PAGE) if case.next_zero else (rest or case.code).ljust(PAGE, b"\xf4")
    return first[:PAGE].ljust(PAGE, b"\xf4"), following[:PAGE]
