"""Our estimator as the benches call it: a recording goes through the whole pipeline, and seconds come out."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from typing import TYPE_CHECKING

from kvtally.agent.calibrating import Extra
from kvtally.agent.kin import kin_of
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.ledger.upgrade import upgrade
from kvtally.agent.recording import open_recording
from kvtally.agent.replay import Replay
from kvtally.agent.request_log import read_requests
from kvtally.agent.savings import EXACTLY_NOTHING, parts_of, seconds_of
from kvtally.agent.steplaw.evidence import Probe
from kvtally.agent.steplaw.laying import laid
from kvtally.agent.steplaw.logged import logged_of
from kvtally.agent.valuing import Laws, values_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kvtally.agent.savings import Seconds
    from kvtally.agent.steplaw.series import Logged, Series

    Range = tuple[float, float, float]

PROBE_ERROR = 0.05
FOREVER_NS = 2**62


def estimate(folder: Path, rung: str) -> Mapping[str, Range]:
    """Avoided engine seconds of a whole recording, by all reuse and by the outer tiers, as (low, point, high).

    Nothing where the figure is refused.
    """
    seconds = valued(folder, rung)
    if seconds is None or seconds.status == "insufficient_data":
        return {}
    outer = [tier.avoided for name, tier in seconds.tiers.items() if name != "hbm"]
    low, point, high = (sum(one[place] for one in outer) for place in range(3)) if outer else EXACTLY_NOTHING
    everything = seconds.avoided
    return {"all": (everything.low, everything.point, everything.high), "outer": (low, point, high)}


def valued(folder: Path, rung: str) -> Seconds | None:
    """The figures of a recording at a rung; None where they are refused outright."""
    with tempfile.TemporaryDirectory() as place:
        url = f"sqlite:///{place}/ledger.db"
        upgrade(url)
        path = f"{place}/ledger.db"
        with closing(LedgerWriter(connect(path), path)) as writer:
            Replay(open_recording(folder), writer).run()
        with LedgerReader(url) as reader, reader.snapshot():
            targets = reader.targets()
            kinds = kin_of(reader, (0, FOREVER_NS), targets)
            subjects = [subject for kin in kinds for subject in kin.subjects]
            extra = {one.name: _extra(folder, rung, one.series) for one in subjects}
            values = values_of(reader, (0, FOREVER_NS), targets, Laws(reader, targets, extra=extra))
    known = [
        (one.calibration, one.loading, one.worth)
        for one in values
        if one.worth is not None and one.calibration is not None
    ]
    if not known:
        return None
    parts = parts_of(known)
    return seconds_of(parts, sum(part.worth.seconds for part in parts))


def _extra(folder: Path, rung: str, series: Series) -> Extra:
    log, probes = folder / "requests.jsonl", folder / "probes.jsonl"
    logged: Logged | None = None
    if "M2" in rung and log.exists():
        with log.open("rb") as lines:
            logged = laid(logged_of(read_requests(lines, "jsonl").requests), [series]).log
    facts: tuple[Probe, ...] = ()
    if "M4" in rung and probes.exists():
        told = [json.loads(line) for line in probes.read_text(encoding="utf-8").splitlines()]
        facts = tuple(Probe(one["prompt_tokens"], 0.0, one["seconds"], PROBE_ERROR) for one in told)
    return Extra(facts, logged, "M2" if logged is not None else "")
