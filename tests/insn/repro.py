"""`python -m tests.insn.repro SEED:INDEX`: runs a case natively and translated, shrinks it if they differ.

`--native` runs it natively only; `--whole` doesn't shrink.
"""

from __future__ import annotations

import argparse
import sys

from tests.insn.generate import Generator
from tests.insn.shrink import shrink
from tests.insn.state import COMPARED_FLAGS, REG_NAMES, Case, CpuState, describe, differences
from tests.insn.worker import NATIVE, TRANSLATED, Worker


def outcome_text(case: Case, state: CpuState) -> str:
    before = dict(zip(REG_NAMES, case.regs, strict=True))
    registers = [f"{n}={v:08x}" for n, v in zip(REG_NAMES, state.regs, strict=True) if v != before[n]]
    flags = state.eflags & COMPARED_FLAGS
    lines = [f"{state.stop} at eip={state.eip:#010x} eflags={flags:#x} {' '.join(registers)}"]
    initial = {page.va: page.data for page in case.pages}
    for va, data in sorted(state.changed.items()):
        at = [i for i, (x, y) in enumerate(zip(initial[va], data, strict=True)) if x != y]
        lines.append(f"  {va + at[0]:#010x}: {data[at[0] : min(at[-1] + 1, at[0] + 32)].hex(' ')}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.insn.repro", description=__doc__)
    parser.add_argument("case", help="SEED:INDEX")
    parser.add_argument("--native", action="store_true", help="run natively only")
    parser.add_argument("--whole", action="store_true", help="don't shrink")
    arguments = parser.parse_args()
    seed, index = (int(part) for part in arguments.case.split(":"))
    case = Generator(seed).case(index)
    with Worker(NATIVE) as native, Worker(TRANSLATED) as translated:
        if arguments.native:
            print(describe(case), outcome_text(case, native.run(case)), sep="\n")
            return 0

        def compare(candidate: Case) -> list[str]:
            expected = native.run(candidate)
            if expected.stop.kind not in ("hlt", "fault"):
                return []
            return differences(candidate, expected, translated.run(candidate))

        lines = compare(case)
        if lines and not arguments.whole:
            kind = {line.split()[0] for line in lines}
            case = shrink(case, lambda c: bool(kind & {line.split()[0] for line in compare(c)}))
            lines = compare(case)
        print(describe(case))
        print("native:", outcome_text(case, native.run(case)))
        print("translated:", outcome_text(case, translated.run(case)))
        print("\n".join(lines) or "they agree")
        return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
