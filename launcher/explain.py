"""`launcher explain`: what a trace file tells, as text, JSON or a report of one HTML file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import EXIT_OK, ConfigError, LauncherError
from launcher.options import check_writable
from tracing.explain import explain as explained
from tracing.explaintext import clean, plain, text
from tracing.file import BadTrace, Trace
from tracing.report import report
from tracing.symbols import BadSymbols, Symbols


@dataclass(frozen=True, slots=True)
class ExplainOptions:
    """`out`: an HTML file instead of text."""

    trace: Path
    out: Path | None
    top: int
    symbols: Path | None
    json: bool


def explain(options: ExplainOptions) -> int:
    """The exit status. A damaged trace is explained up to the damage, and a line says where that is."""
    if options.out is not None:
        check_writable(options.out)
    try:
        symbols = Symbols.load(options.symbols) if options.symbols is not None else None
    except BadSymbols as error:
        raise LauncherError(str(error)) from error
    try:
        trace = Trace(options.trace)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise ConfigError(options.trace, "", problem, "name what `launcher trace --out` wrote") from error
    except BadTrace as error:
        raise LauncherError(str(error)) from error
    with trace:
        found = explained(trace, symbols)
    for line in found.complaints:
        print(f"launcher: {clean(line)}", file=sys.stderr)
    if options.json:
        print(json.dumps(plain(found, options.top), indent=1))
    if options.out is not None:
        try:
            options.out.write_text(report(found, options.top), encoding="utf-8")
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise ConfigError(options.out, "", problem, "name another file") from error
        if not options.json:
            print(options.out)
    elif not options.json:
        for line in text(found, options.top):
            print(line)
    return EXIT_OK
