"""Prints docs/configuration.md: every key of the config, read off its structs."""

from __future__ import annotations

import inspect
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

import msgspec

from kvtally.agent import config_keys
from kvtally.agent.config import SEARCHED, Config

if TYPE_CHECKING:
    from kvtally.agent.config_keys import Key

INTRODUCTION = """\
# Configuration

<!-- printed by docs/configuration.py; `just docs` writes it anew -->

`kvtally` needs no config: it finds engines, GPUs and disks on its host. A config names what cannot be found out: \
which GPUs an engine holds, whose tokens they are, what a GPU-hour costs.

**Where it is read from.** The file after `--config`; else the file that `$KVTALLY_CONFIG` names; else the first of \
{searched} that exists. The format is TOML. An unknown key, a wrong type or a value out of its range is an error that \
names the file and the path of the key; nothing is ignored.

**Environment.** Every key `a.b` can be set by `KVTALLY_A__B` (two underscores between the parts), which comes before \
the file. Lists are written with commas or as JSON: `KVTALLY_SCRAPE__PORTS=8000,8200`. Engines are counted from 0: \
`KVTALLY_ENGINE__0__URL`. A variable that names no key is an error; one without two underscores is none of ours, \
because Kubernetes sets `KVTALLY_PORT` and the like beside a service called kvtally. `KVTALLY_CONFIG` and \
`KVTALLY_LEDGER` are no keys: they name the file and the ledger. A relative path in a file counts from that file, one \
in the environment from the working folder.

**Where the ledger is.** `--ledger`, else `$KVTALLY_LEDGER`, else `ledger.url`, else `ledger.db` in the folder that \
systemd names in `$STATE_DIRECTORY`, else in `$XDG_STATE_HOME/kvtally` (`~/.local/state/kvtally`). Under systemd, set \
`ledger.url` in `{system}`, so that `kvtally cost` in a shell reads what the daemon writes.

## Example

```toml
[scrape]
interval_seconds = 1

[labels]
cluster = "fra1"

[[engine]] # tensor-parallel over two GPUs, one replica
url = "http://127.0.0.1:8000/metrics"
gpus = ["GPU-6c1ba8a5-7a5e-4d0e-9d5b-0d3f7a2f1c11", "GPU-f1d6a7c2-58a4-4b8e-8b9e-2f3e1c0d9a22"]
gpus_per_replica = 2
kv_paths = ["/mnt/kv"]
kv_dram_gib = 64

[engine.labels] # of the engine above
namespace = "chat"
tenant = "search"

[rates]
card = "rates.toml"
term = "reserved"
```

## Every key
"""


def page() -> str:
    """The whole page."""
    text = INTRODUCTION.format(searched=" and ".join(f"`{each}`" for each in SEARCHED), system=SEARCHED[-1])
    for table, keys in groupby(config_keys.keys(Config), key=lambda key: key.path.rpartition(".")[0]):
        text += f"\n### {_title(table)}\n\n{_about(table)}\n\n"
        text += "| key | type and range | default | variable | meaning |\n|---|---|---|---|---|\n"
        text += "".join(_row(key) for key in keys)
    return text


def _title(table: str) -> str:
    return f"`[[{table.removesuffix('[]')}]]`" if table.endswith("[]") else f"`[{table.replace('[]', '')}]`"


def _about(table: str) -> str:
    parts = table.replace("[]", ".[]").split(".")
    text = inspect.getdoc(config_keys.type_at(Config, tuple(0 if part == "[]" else part for part in parts))) or ""
    return f"{text} What is not given here is taken from `[labels]`." if table == "engine[].labels" else text


def _row(key: Key) -> str:
    name = key.path.rpartition(".")[2]
    default = "required" if key.required else _written(key.default)
    return f"| `{name}` | {config_keys.words(key.type)} | {default} | `{key.variable}` | {key.meaning} |\n"


def _written(default: Any) -> str:
    """A default as a file would say it, runs of ports shortened; absent where nothing is known without it."""
    if default is None:
        return "absent"
    if isinstance(default, tuple):
        return _runs(default) or "`[]`"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{json.dumps(msgspec.to_builtins(default))}`"


def _runs(numbers: tuple[int, ...]) -> str:
    texts = []
    for _, run in groupby(enumerate(numbers), key=lambda each: each[1] - each[0]):
        members = [number for _, number in run]
        texts.append(str(members[0]) if len(members) == 1 else f"{members[0]} to {members[-1]}")
    return ", ".join(texts)


if __name__ == "__main__":
    print(page(), end="")
