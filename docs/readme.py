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
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "110"}
    done = subprocess.run(
        [sys.executable, "-m", "kvtally", "demo"], check=True, capture_output=True, text=True, env=environment
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines() if line.strip()) + "\n"


def page(readme: str, shown: str) -> str:
    """The README with `shown` between its marks."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return before + START + shown + END + after


if __name__ == "__main__":
    print(page(README.read_text(), demo()), end="")
