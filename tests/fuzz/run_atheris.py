"""`make fuzz`: coverage-guided, until told to stop: `python -m tests.fuzz.run_atheris [libFuzzer options]`.

Atheris (libFuzzer) chooses the inputs by what they reach in the decoder, the templates, the translator and
the simulator; each goes through all of target.check, in the engine too.  Inputs that reach something new are
kept in build/fuzz.  One that breaks a promise is written to build/fuzz-crash-*; one that ends the process or
hangs is in build/fuzz-current.  Needs the extra `fuzz`: atheris, which has wheels for some CPythons only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found,unused-ignore]

INSTRUMENTED = ["decode", "emit", "translate", "rollback", "line", "simulate", "single", "handlers_string",
                "encode", "emit_soft", "emit_system", "fast_unsafe"]
ROOT = Path(__file__).parents[2]
FOUND, ARTIFACTS = ROOT / "build" / "fuzz", ROOT / "build" / "fuzz-"
LONGEST = 99
# The engine takes the fault signals and SIGALRM for itself; a hang shows in the input being left behind.
OPTIONS = (
    "-handle_segv=0", "-handle_bus=0", "-handle_fpe=0", "-handle_ill=0", "-timeout=0", "-rss_limit_mb=0",
    f"-max_len={LONGEST}", "-len_control=0", f"-artifact_prefix={ARTIFACTS}", "-print_final_stats=1",
)  # fmt: skip
CHECK_EVERY = 256  # inputs between looks at what lies outside of the windows


def main() -> None:
    with atheris.instrument_imports(include=[f"cpu_node.{name}" for name in INSTRUMENTED]):
        import cpu_node.simulate
        import cpu_node.translate  # noqa: F401
    from cpu_node import stubs_unsafe
    from tests.fuzz.inputs import CORPUS
    from tests.fuzz.machine import Machine
    from tests.fuzz.target import Broken, check

    FOUND.mkdir(parents=True, exist_ok=True)
    current = ARTIFACTS.with_name("fuzz-current")
    atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[1:], str(FOUND), str(CORPUS)], lambda data: one(data))
    stubs_unsafe.install()
    machine = Machine()
    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        current.write_bytes(data)
        check(data, machine)
        count += 1
        if count % CHECK_EVERY == 0 and (wrong := machine.damage()):
            raise Broken("; ".join(wrong))

    atheris.Fuzz()


if __name__ == "__main__":
    main()
