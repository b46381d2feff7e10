"""`python -m tests.insn.repro SEED:INDEX`: runs a case natively and translated, shrinks it if they differ.

`--whole` doesn't shrink, `--executor NAME` takes another one than "translated" (tests/insn/executors.py).
The cases of its family that come before it are run first, as they were.
"""

from __future__ import annotations

import argparse

from tests.insn.executors import EVERY, NATIVE, TRANSLATED
from tests.insn.generate import VARIATIONS, Generator
from tests.insn.judge import Verdict, judge, no_verdict
from tests.insn.shrink import shrink
from tests.insn.state import COMPARED_FLAGS, REG_NAMES, Case, CpuState, describe
from tests.insn.worker import Worker


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


def shrink_failure(seed: int, index: int, executor: str = TRANSLATED, whole: bool = False) -> str:
    """The case, what it did natively and in the executor, and the differences; shrunk unless `whole`.

    Where it differs only after the cases before it in its family, it isn't shrunk.
    """
    generator = Generator(seed)
    first = index - index % VARIATIONS
    earlier, case = [generator.case(i) for i in range(first, index)], generator.case(index)
    with Worker(NATIVE) as native, Worker(executor) as other:

        def compare(candidate: Case, before: list[Case]) -> list[str]:
            expected = native.run(candidate)
            if no_verdict(expected) is not None:
                return []
            for one in before:
                other.run(one)
            verdict, lines = judge(candidate, expected, other.run(candidate))
            return lines if verdict is Verdict.DIFFERS else []

        before: list[Case] = []
        lines = compare(case, before)
        if not lines:
            before = earlier
            lines = compare(case, before)
        if lines and not whole and not before:
            kinds = {line.split()[0] for line in lines}
            case = shrink(case, lambda c: bool(kinds & {line.split()[0] for line in compare(c, [])}))
            lines = compare(case, [])
        if lines and before:
            lines.append("(only after the cases before it in its family)")
        return "\n".join(
            (
                f"case {seed}:{index}",
                describe(case),
                f"native: {outcome_text(case, native.run(case))}",
                f"{executor}: {outcome_text(case, other.run(case))}",
                *(lines or ["they agree"]),
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.insn.repro", description=__doc__)
    parser.add_argument("case", help="SEED:INDEX")
    parser.add_argument("--executor", default=TRANSLATED, choices=tuple(EVERY))
    parser.add_argument("--whole", action="store_true", help="don't shrink")
    arguments = parser.parse_args()
    seed, index = (int(part) for part in arguments.case.split(":"))
    print(shrink_failure(seed, index, arguments.executor, arguments.whole))


if __name__ == "__main__":
    main()
