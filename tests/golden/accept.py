"""`python -m tests.golden.accept`: today's translations become the expected ones. Look at the diff first."""

from __future__ import annotations

from tests.golden.blocks import GROUPS
from tests.golden.render import ACCEPTED, accepted_file, render


def main() -> None:
    ACCEPTED.mkdir(exist_ok=True)
    for old in ACCEPTED.glob("*.txt"):
        if old.stem not in GROUPS:
            old.unlink()
            print(f"{old.name}: removed")
    for group in GROUPS:
        path, text = accepted_file(group), render(group)
        before = path.read_text() if path.exists() else ""
        if before != text:
            path.write_text(text)
            print(f"{path.name}: {'changed' if before else 'new'}")


if __name__ == "__main__":
    main()
