"""`kvtally run` as a program of its own, without the command line's library: a fifth less memory."""

from __future__ import annotations

import os
import sys

from kvtally.agent.config import ledger_url, load
from kvtally.agent.daemon import Daemon
from kvtally.agent.log import Log


def main(arguments: list[str]) -> int:
    """Run with [ledger URL, config file or "", "once" or ""]; the exit status."""
    url, config_path, once = arguments
    try:
        config = load(config_path or None, os.environ)
        log = Log(config.log.format, config.log.level)
        Daemon(config, ledger_url(url, config, os.environ), log, config_path or None).run(once=bool(once))
    except Exception as error:
        from kvtally.agent.failure import explain  # noqa: PLC0415  # only when something is wrong

        told = explain(error)
        if told is None:
            raise
        sys.stderr.write(told.text + "\n")
        return told.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
