"""Prints README.md with its block of `kvtally demo` made anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- demo -->\n```\n", "```\n<!-- /demo -->"


def demo() -> str:
    """What `kvtally demo` prints into a pipe."""
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    words = [sys.executable, "-m", "kvtally", "demo"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def page(readme: str, shown: str) -> str:
    """The README with `shown` between its marks; ValueError where they are not there once."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in after:
        raise ValueError(f"{README} has no block of the demo, or two")
    return before + START + shown + END + after


if __name__ == "__main__":
    print(page(README.read_text(), demo()), end="")
