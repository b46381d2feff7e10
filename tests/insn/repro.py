"""`python -m tests.insn.repro SEED:INDEX`: runs a case natively and translated, shrinks it if they differ.

`--whole` doesn't shrink, `--kind simulated` takes the simulator instead of the translator.
"""

from __future__ import annotations

import argparse

from tests.insn.agree import NATIVE_ENDS
from tests.insn.generate import Generator
from tests.insn.shrink import shrink
from tests.insn.state import COMPARED_FLAGS, REG_NAMES, Case, CpuState, describe, differences
from tests.insn.worker import NATIVE, SIMULATED, TRANSLATED, Worker


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


def shrink_failure(seed: int, index: int, kind: str = TRANSLATED, whole: bool = False) -> str:
    """The case, what it did natively and in the other runner, and the differences; shrunk unless `whole`."""
    case = Generator(seed).case(index)
    with Worker(NATIVE) as native, Worker(kind) as other:

        def compare(candidate: Case) -> list[str]:
            expected = native.run(candidate)
            if expected.stop.kind not in NATIVE_ENDS:
                return []
            return differences(candidate, expected, other.run(candidate))

        lines = compare(case)
        if lines and not whole:
            kinds = {line.split()[0] for line in lines}
            case = shrink(case, lambda c: bool(kinds & {line.split()[0] for line in compare(c)}))
            lines = compare(case)
        return "\n".join(
            (
                f"case {seed}:{index}",
                describe(case),
                f"native: {outcome_text(case, native.run(case))}",
                f"{kind}: {outcome_text(case, other.run(case))}",
                *(lines or ["they agree"]),
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.insn.repro", description=__doc__)
    parser.add_argument("case", help="SEED:INDEX")
    parser.add_argument("--kind", default=TRANSLATED, choices=(TRANSLATED, SIMULATED))
    parser.add_argument("--whole", action="store_true", help="don't shrink")
    arguments = parser.parse_args()
    seed, index = (int(part) for part in arguments.case.split(":"))
    print(shrink_failure(seed, index, arguments.kind, arguments.whole))


if __name__ == "__main__":
    main()
