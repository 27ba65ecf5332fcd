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
`KVTALLY_ENGINE__0__URL`, and pages as engines are. A variable that names no key is an error; one without two \
underscores is none of ours, because Kubernetes sets `KVTALLY_PORT` and the like beside a service called kvtally. \
`KVTALLY_CONFIG` and `KVTALLY_LEDGER` are no keys: they name the file and the ledger. A relative path in a file counts \
from that file, one in the environment from the working folder.

**Where the ledger is.** `--ledger`, else `$KVTALLY_LEDGER`, else `ledger.url`, else `ledger.db` in the folder that \
systemd names in `$STATE_DIRECTORY`, else in `$XDG_STATE_HOME/kvtally` (`~/.local/state/kvtally`). Under systemd, set \
`ledger.url` in `{system}`, so that `kvtally cost` in a shell reads what the daemon writes.

**Pages that are not open to all.** The tables `access` name the files that hold a bearer token, a password, \
certificates and keys; no secret stands in the config, on a command line, in a log or in a message, and a URL that \
holds one is refused. Secrets go to the host and port of their URL alone: a redirect to another is not followed. A \
token is read again when its file changes, as Kubernetes changes it, and once more when the server refuses it; \
certificates are read again when a connection is made. Over plain http a secret is sent in clear text: `kvtally \
doctor` warns of it. Where the metrics of llm-d's router ask for a token, `bearer_token_file = \
"/var/run/secrets/kubernetes.io/serviceaccount/token"` and a role with `get` on the nonResourceURLs `/metrics` do.

**Engines from files.** `scrape.file_sd` names files in the format of Prometheus' `file_sd_configs`, which are read \
again when they change. A broken file keeps what it named before, and one that is gone loses it. Files that end in \
`.yml` or `.yaml` take `pip install 'kvtally[yaml]'`, and a MiB of the daemon's memory; anchors, aliases and \
tags are refused. Or convert them: `yq -o=json targets.yml > targets.json`. Of the labels, kvtally reads `__scheme__`, \
`__metrics_path__` and `__param_*`; `cluster`, `namespace` and `tenant`; `instance` as the name, where a group has one \
target; `llm-d.ai/role`, `llm_d_ai_role` or `role` (`prefill`, `decode`, `both`); and its own `kvtally_kind` \
(`engine`, or `page` for what a `[[page]]` would name), `kvtally_group`, and `kvtally_engines`, the names of a page's \
engines with commas between. What `[[engine]]` and `[[page]]` list goes before the files.

```json
[
  {{"targets": ["10.0.0.7:8000", "10.0.0.8:8000"], "labels": {{"namespace": "chat", "role": "decode"}}}},
  {{"targets": ["10.0.0.7:7000"], "labels": {{"kvtally_kind": "page", "kvtally_engines": "10.0.0.7:8000"}}}}
]
```

**In a pod.** Beside an engine of the same pod, what the config leaves open is taken from the downward API: the \
variables `POD_NAME`, `POD_NAMESPACE`, `NODE_NAME`, `POD_IP` and `HOST_IP`, and the pod's labels in \
`/etc/podinfo/labels` or the file that `$KVTALLY_POD_LABELS` names, of which `llm-d.ai/role`, `llm-d.ai/model` and \
`llm-d.ai/engine-type` are read. On the network of the host (`POD_IP` is `HOST_IP`) only the node is taken, since the \
engines there are other pods'.

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

[engine.access] # of the same engine
bearer_token_file = "/run/secrets/token"

[[page]] # what is no engine: here an LMCache server
url = "http://127.0.0.1:7000/metrics"
engines = ["127.0.0.1:8000"]

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
    if isinstance(default, tuple) and all(isinstance(each, int) for each in default):
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
