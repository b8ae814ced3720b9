"""Calls the data tools as their command lines would, for the tests of data/."""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
sys.path.insert(0, str(DATA))  # the tools import one another as scripts do
common, compare, fineweb, plot, record, sample, text = map(
    importlib.import_module, ("common", "compare", "fineweb", "plot", "record", "sample", "text")
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(
    module: ModuleType,
    *arguments: object,
    terminal: bool = False,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> Result:
    """Runs a tool's main function in this process as its command line would: piped, at a terminal, or on `stdout`."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in common.STOPS}
    err.isatty = lambda: terminal
    sys.argv = [module.__name__, *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(stdout or out),
            contextlib.redirect_stderr(stderr or err),
            pytest.raises(SystemExit) as stop,
        ):
            common.run_tool(module.main)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Result(stop.value.code, out.getvalue(), err.getvalue())


def is_one_line_error(result: Result, *words: str) -> bool:
    """The contract for a user's mistake: exit code 2 and `error: what — what to do` as the only line on stderr."""
    lines = result.err.splitlines()
    one_line = result.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and " — " in lines[0]
    return one_line and all(word in lines[0] for word in words)
