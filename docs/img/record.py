"""Records a session in a terminal as an animated SVG: `python docs/img/record.py docs/img/boot.svg`.

A real one: tmux runs a shell, the commands of SCRIPT are typed when the text before them has appeared, and
the screen is captured RATE times a second. It is played back at the speed it had; only waits for the next key
are ours. Where a viewer plays no animation it shows the last screen before the machine ends.
Needs tmux and `make setup guest`. Left out: colours, the cursor.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from xml.sax.saxutils import escape

COLUMNS, ROWS, RATE = 100, 30, 5
CHAR_W, LINE_H, MARGIN = 7.8, 17, 14
READ_S = 1.5  # for the viewer to read an answer before the next command
HOLD_S = 4.0  # the last screen
KEY_S = 0.06
LIMIT_S = 120.0
SCRIPT = (  # (the last line that must be on the screen, what is typed then)
    ("$ ", "make run"),
    ("/ # ", "head -5 /proc/cpuinfo"),
    ("/ # ", "head -7 /proc/interrupts"),
    ("/ # ", "dd if=/dev/urandom bs=1M count=8 | md5sum"),
    ("/ # ", "uname -a"),
    ("/ # ", "poweroff -f"),
)
LAST = "powered off after"
STYLE = (
    "rect{fill:#16181d}text{fill:#d6d9de;font-size:13px;white-space:pre;"
    "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
)

Screen = tuple[str, ...]


class Terminal:
    """A shell in a tmux server of its own."""

    def __init__(self) -> None:
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, "env PS1='$ ' sh")
        self._tmux("set", "-g", "status", "off")
        self._tmux("resize-window", *size)
        self.frames: list[tuple[float, Screen]] = []
        self._next = time.monotonic()

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-L", "backplane-record", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def look(self) -> Screen:
        """Wait for the next capture's time, and take it."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        now = self._next = max(self._next, time.monotonic())
        self._next += 1 / RATE
        screen = tuple(line.rstrip() for line in self._tmux("capture-pane", "-p").splitlines())
        if not self.frames or self.frames[-1][1] != screen:
            self.frames.append((now, screen))
        return screen

    def wait_for(self, text: str, last_line: bool) -> None:
        limit = time.monotonic() + LIMIT_S
        while time.monotonic() < limit:
            lines = [line for line in self.look() if line]
            if lines[-1:] == [text.rstrip()] if last_line else any(text in line for line in lines):
                return
        raise SystemExit(f"{text!r} has not appeared; the screen:\n" + "\n".join(self.look()))

    def type(self, text: str) -> None:
        for key in text:
            self._tmux("send-keys", "-l", key)
            time.sleep(KEY_S)
            self.look()
        self._tmux("send-keys", "Enter")

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()

    def close(self) -> None:
        self._tmux("kill-server")


def record() -> tuple[list[tuple[float, Screen]], int]:
    """The frames, and the number of the one that stands for all."""
    terminal = Terminal()
    still = 0
    try:
        for prompt, line in SCRIPT:
            terminal.wait_for(prompt, last_line=True)
            terminal.pause(READ_S)
            still = len(terminal.frames) - 1
            terminal.type(line)
        terminal.wait_for(LAST, last_line=False)
        terminal.pause(HOLD_S)
    finally:
        terminal.close()
    return terminal.frames, still


def svg(frames: list[tuple[float, Screen]], still: int) -> str:
    """All frames one below the other, of which a window shows one at a time. Each line is there once."""
    width, height = round(COLUMNS * CHAR_W + 2 * MARGIN), ROWS * LINE_H + 2 * MARGIN
    start, total = frames[0][0], frames[-1][0] - frames[0][0] + HOLD_S
    known: dict[str, str] = {}
    groups, steps = [], []
    for number, (at, screen) in enumerate(frames):
        y = number * height
        uses = []
        for row, line in enumerate(screen[:ROWS]):
            if line:
                name = known.setdefault(line, f"l{len(known)}")
                uses.append(f'<use href="#{name}" x="{MARGIN}" y="{y + MARGIN + (row + 1) * LINE_H - 4}"/>')
        groups.append("".join(uses))
        steps.append(f"{(at - start) / total:.3%}{{transform:translateY(-{y}px)}}")
    lines = "".join(
        f'<text id="{name}" xml:space="preserve" textLength="{len(line) * CHAR_W:.0f}">{escape(line)}</text>'
        for line, name in known.items()
    )
    play = f"#s{{animation:p {total:.1f}s step-end infinite}}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
            f"<style>{STYLE}{play}@keyframes p{{{''.join(steps)}}}",
            "@media (prefers-reduced-motion){#s{animation:none}}</style>",
            f'<rect width="{width}" height="{height}" rx="8"/><defs>{lines}</defs>',
            f'<svg width="{width}" height="{height}"><g id="s" transform="translate(0,-{still * height})">',
            *groups,
            "</g></svg></svg>",
        ]
    )


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    frames, still = record()
    Path(sys.argv[1]).write_text(svg(frames, still), encoding="utf-8")
    print(f"{len(frames)} screens, {frames[-1][0] - frames[0][0]:.1f} s")


if __name__ == "__main__":
    main()
