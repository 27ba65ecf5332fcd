"""`python -m kvtally` is the command `kvtally`."""

from __future__ import annotations

from kvtally.agent.cli import main

if __name__ == "__main__":
    main()
