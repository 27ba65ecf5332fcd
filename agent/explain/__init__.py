"""`--explain`: one figure of the savings followed down to its counters, so that a pocket calculator can redo it.

arithmetic   lines that are computed from their inputs as printed
pieces       the report's hours, taken apart again from raw intervals
figure       W, its costs, the net; the error of it by cause
inputs       the counters, with where they are read
classes      the requests by reused tokens
request      one request, worked out term by term
law          the parameters, before and after the evidence
tiers        whose work it is: serving, last-in, Shapley
money        prices, holding, cash
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.explain.classes import classes_json
from kvtally.agent.explain.figure import Couplings, error_budget, interval_lines, seconds_lines
from kvtally.agent.explain.inputs import ENGINE, inputs_json
from kvtally.agent.explain.law import law_json
from kvtally.agent.explain.money import money_json
from kvtally.agent.explain.pieces import taken_apart
from kvtally.agent.explain.request import worked_request
from kvtally.agent.explain.tiers import gained_by, tier_lines, tiers_json
from kvtally.agent.facts import VLLM
from kvtally.agent.finding import plural, utc_text
from kvtally.agent.kin import known_laws
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.savings import EXACTLY_NOTHING, parts_of
from kvtally.agent.steplaw.explained import classes, example
from kvtally.agent.words import REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtally.agent.explain.pieces import Apart, Piece
    from kvtally.agent.ledger.calibrations import StoredCalibration
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.savings import Part, Seconds
    from kvtally.agent.savings_report import Group, SavingsReport
    from kvtally.agent.valuing import Laws, Valued


def explained(reader: LedgerReader, report: SavingsReport, laws: Laws | None = None) -> list[dict[str, Any]]:
    """An explanation of each group of the report as plain values; `laws` as they were given to the report.

    Ask inside the reader's snapshot in which the report was made.
    """
    apart = taken_apart(reader, report, laws)
    stored = known_laws(reader.calibrations(), reader.targets())
    return [_group(reader, group, apart, report.currency, stored) for group in report.groups]


def _group(
    reader: LedgerReader, group: Group, apart: Apart, currency: str, stored: Sequence[StoredCalibration]
) -> dict[str, Any]:
    pieces = [apart.pieces[key] for key in _keys(group.values) if key in apart.pieces]
    answer: dict[str, Any] = {
        "by": group.by,
        "status": group.status,
        "reasons": [str(reason) for reason in group.reasons],
        "inputs": inputs_json(reader, pieces, _settled_sums(reader, group, apart), _engines(group)),
        "gone": _gone(group, apart),
        **dict.fromkeys(("figure", "classes", "request", "laws", "errors", "tiers", "money")),
    }
    seconds = group.seconds
    parts = _parts(group.values)
    answer["laws"] = [law_json(part, _machine(pieces, part), stored) for part in _by_law(parts)]
    if seconds is None or group.status in REFUSED:
        return answer
    return answer | _figures(group, seconds, parts, pieces, apart=apart, currency=currency)


def _figures(
    group: Group,
    seconds: Seconds,
    parts: Sequence[Part],
    pieces: Sequence[Piece],
    *,
    apart: Apart,
    currency: str,
) -> dict[str, Any]:
    """What a group with a figure has beyond its inputs."""
    requests = [piece.requests for piece in pieces if piece.requests is not None]
    is_logged = bool(requests) and all(one.load.populations[0] is one.load.populations[-1] for one in requests)
    couplings = _couplings(group.values, seconds, apart)
    loading = " and ".join(dict.fromkeys(part.loading for part in parts))
    found = classes(requests)
    elsewhere, name = _elsewhere(group, apart)
    table = classes_json(found, couplings.avoided[1], elsewhere, name, is_logged=is_logged)
    lines = seconds_lines(seconds, couplings.summed(float(table["total"]["avoided"])), parts)
    figure = {"rows": lines.as_json(), "interval": None}
    errors, sd = None, None
    sds: dict[str, str] = {}
    if seconds.avoided != EXACTLY_NOTHING:
        gained = gained_by(seconds)
        errors = error_budget(seconds, parts, lines, gained)
        values = {row["symbol"]: row["value"] for row in (*errors["rows"], *errors["tiers"])}
        sd, sds = values["sd"], {side: values[f"sd_{side}"] for side in gained}
    interval = interval_lines(seconds, sd, lines)
    figure["interval"] = interval.as_json() or None
    best = max(found, key=lambda one: one.nothing - one.actual, default=None)
    worked = None
    if best is not None and best.reused_tokens and seconds.avoided != EXACTLY_NOTHING:
        worked = worked_request(example(requests, best), is_logged=is_logged)
    sizes = {one.machine.kv_bytes for one in requests}
    tiers = tiers_json(seconds, loading, sizes.pop() if len(sizes) == 1 else None)
    if tiers is not None:
        rows = {row["symbol"]: row["value"] for row in tiers["rows"]}
        interval = tier_lines(seconds, interval.printed() | rows, sds)
        tiers["interval"] = interval.as_json() or None
    return {
        "figure": figure,
        "classes": table,
        "request": worked,
        "errors": errors,
        "tiers": tiers,
        "money": money_json(group, currency, interval, parts),
    }


def _keys(values: Iterable[Valued]) -> list[tuple[int, int]]:
    return [(value.hour_ns, value.target_id) for value in values]


def _parts(values: Iterable[Valued]) -> list[Part]:
    """As the report adds them up."""
    return parts_of(
        (value.calibration, value.loading, value.worth)
        for value in values
        if value.calibration is not None and value.worth is not None
    )


def _by_law(parts: Sequence[Part]) -> list[Part]:
    """One part for each law, however its replicas load."""
    return list({(part.calibration.id, part.calibration.fingerprint.text()): part for part in parts}.values())


def _machine(pieces: Sequence[Piece], part: Part) -> Any:
    """The machine of the replicas that a law is for; None where none of them could be taken apart."""
    own = (one.requests for one in pieces if one.requests is not None)
    return next((one.machine for one in own if one.calibration.fingerprint == part.calibration.fingerprint), None)


def _couplings(values: Sequence[Valued], seconds: Seconds, apart: Apart) -> Couplings:
    """W under each coupling as the report has it, or, where MFU counters narrow them, before they do."""
    raw, is_narrowed = [0.0, 0.0, 0.0], False
    for value in values:
        if value.worth is None or value.calibration is None:
            continue
        piece = apart.pieces.get((value.hour_ns, value.target_id))
        own = value.worth.avoided
        if piece is not None and piece.requests is not None and piece.requests.position is not None:
            own, is_narrowed = piece.requests.avoided, True
        raw = [total + part for total, part in zip(raw, own, strict=True)]
    together, mixed, separate = raw
    position = None
    if is_narrowed and together != separate:
        position = (seconds.avoided.point - separate) / (together - separate)
    return Couplings((together, mixed, separate), position)


def _elsewhere(group: Group, apart: Apart) -> tuple[float, str]:
    """Seconds avoided (mixed) in hours that are told as sums, and what to call them; "" where there are none."""
    told = [
        value.worth.avoided[1]
        for value in group.values
        if value.worth is not None and (value.hour_ns, value.target_id) not in apart.pieces
    ]
    return sum(told), f"{plural(len(told), 'settled hour')}, as they were settled" if told else ""


def _gone(group: Group, apart: Apart) -> dict[str, Any] | None:
    """What can no longer be taken apart, in words; None where everything can."""
    keys = set(_keys(group.values))
    gone, left_out = keys & apart.gone, keys & apart.left_out
    if not gone and not left_out:
        return None
    hours = sorted({hour for hour, _ in gone | left_out})
    what = "raw intervals have left the ledger" if gone else "hours are many"
    hint = "" if gone else ": ask for a shorter window (--since) to see all of it"
    words = (
        f"the {what}: of {len(hours)} hours the settled sums stand for requests, histograms, clocks and the counters' "
        f"values, and no request of theirs can be worked out{hint}"
    )
    return {"hours": len(hours), "first": utc_text(hours[0]), "until": utc_text(hours[-1] + HOUR_NS), "words": words}


def _engines(group: Group) -> set[str]:
    """What its engines are."""
    return {one.replica.engine for one in group.facts if one.replica is not None} or {VLLM}


def _settled_sums(reader: LedgerReader, group: Group, apart: Apart) -> dict[str, int | None]:
    """What the engine counted in the hours without raw intervals at hand; {} where there are none."""
    missing = {key for key in _keys(group.values) if key not in apart.pieces}
    if not missing:
        return {}
    hours = [hour for hour, _ in missing]
    sums: dict[str, int | None] = dict.fromkeys(ENGINE, 0)
    for row in reader.hour_sums("engine", min(hours), max(hours) + HOUR_NS):
        if (row["hour_ns"], row["target_id"]) in missing:
            for name, total in sums.items():
                sums[name] = None if row[name] is None or total is None else total + row[name]
    return sums
