"""Checks of what was counted: hit rate, counters that reconcile, coverage, and sources that are gone. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.check.verdict import Bound, Check, Found, is_unheld, of_group, said, span_seconds
from kvtally.agent.finding import plural
from kvtally.agent.interval import BACKWARDS, IMPOSSIBLE
from kvtally.agent.states import STATES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.agent.check.seen import Audited, Seen, Source
    from kvtally.agent.check.verdict import Asked

PROMPT_LEAST = 10_000  # prompt tokens from which on a hit rate says something about a cache
WORTH_LOSING = 0.1  # a hit rate below this cannot collapse
LATE_NS = 120 * 10**9  # and three intervals: how far behind the ledger an engine may be
LATE_INTERVALS = 3
# warnings by their severity, and yet counters that contradict themselves
_BROKEN = (BACKWARDS, IMPOSSIBLE)
_DOUBTFUL = ("gateway_disagrees", "hour_overtaken", "tokens_lost", "tokens_unknown")
_GAPS = ("not_watched", "scrapes_failed")
_NONE = Bound("at_most", 0)
_DISTRUST = "`kvtally ledger audit` names every interval; figures of this window cannot be trusted"


def hit_rates(asked: Asked, seen: Seen) -> Iterator[Check]:
    """The share of prompt tokens that was reused, against a bound and against the window before."""
    groups = [group for group in seen.cost["groups"] if not is_unheld(group)]
    earlier = {tuple(group["by"].items()): group for group in (seen.before or {"groups": []})["groups"]}
    for group in groups:
        if asked.hit_rate_min is not None:
            yield _hit_rate(group, asked.hit_rate_min)
        if asked.hit_rate_drop is not None:
            yield _collapse(group, earlier.get(tuple(group["by"].items())), asked.hit_rate_drop)


def _rate(group: Mapping[str, Any] | None) -> float | None:
    """The hit rate; None where it is not told, or of too few tokens."""
    tokens = {"prompt": None, "computed": None} if group is None else group["tokens"]
    prompt, computed = tokens["prompt"], tokens["computed"]
    if prompt is None or computed is None or prompt < PROMPT_LEAST:
        return None
    return float((prompt - computed) / prompt)


def _no_rate(group: Mapping[str, Any]) -> str:
    tokens = group["tokens"]
    if tokens["prompt"] is None or tokens["computed"] is None:
        return "which prompt tokens were reused is not told"
    return f"{tokens['prompt']:,} prompt tokens in the window: too few for a hit rate, {PROMPT_LEAST:,} would do"


def _hit_rate(group: Mapping[str, Any], least: float) -> Check:
    by, bound, rate = group["by"], Bound("at_least", least), _rate(group)
    if rate is None:
        return Check("hit-rate", by, "unknown", _no_rate(group), "", None, bound)
    found, basis = Found(round(rate, 6), "share"), group["basis"]["tokens"]
    message = f"{rate:.1%} of the prompt tokens were reused"
    if rate < least:
        message += f", less than {least:.1%}"
        hint = "`kvtally savings` tells the tiers; a new prompt template or routing that scatters a prefix are usual"
        return Check("hit-rate", by, "failed", message, "", found, bound, basis, hint)
    return Check("hit-rate", by, "ok", message, "", found, bound, basis)


def _collapse(group: Mapping[str, Any], earlier: Mapping[str, Any] | None, drop: float) -> Check:
    by, now, before, subject = group["by"], _rate(group), _rate(earlier), "change"
    if now is None:
        return Check("hit-rate", by, "unknown", _no_rate(group), subject)
    if before is None:
        message = f"the window before has no hit rate to compare with: it takes {PROMPT_LEAST:,} prompt tokens"
        return Check("hit-rate", by, "unknown", message, subject)
    basis = group["basis"]["tokens"]
    found, bound = Found(round(now, 6), "share"), Bound("at_least", round(before * (1 - drop), 6))
    message = f"{now:.1%} of the prompt tokens were reused, in the window before {before:.1%}"
    if before >= WORTH_LOSING and now < before * (1 - drop):
        hint = "a restart that emptied the cache, a new prompt template and a smaller cache are the usual reasons"
        return Check("hit-rate", by, "failed", message, subject, found, bound, basis, hint)
    return Check("hit-rate", by, "ok", message, subject, found, bound, basis)


def reconciled(seen: Seen) -> Iterator[Check]:
    """Whether the counters agree with themselves and with each other, and the ledger with its own invariants."""
    errors, doubts = _sorted_out(seen)
    failed = [_contradiction(kind, target, found, is_error=True) for (kind, target), found in errors.items()]
    if "identity_broken" not in {kind for kind, _ in errors}:
        failed += _refused(seen)
    yield from failed
    for (kind, target), found in doubts.items():
        yield _contradiction(kind, target, found, is_error=False)
    if not failed:
        nothing = Found(0, "errors")
        yield Check("reconcile", {}, "ok", _sound(seen.audited), "", nothing, _NONE, "MEASURED")


_Found = dict[tuple[str, str], list["Mapping[str, str]"]]


def _sorted_out(seen: Seen) -> tuple[_Found, _Found]:
    """Findings that say that something does not reconcile, and those that doubt it, by kind and target."""
    errors: _Found = {}
    doubts: _Found = {}
    told = set()
    every = [*seen.cost["findings"], *(seen.audited.findings if seen.audited else ())]
    for one in every:
        same = (one["kind"], one["target"], one["start"], one["end"])
        is_error = one["severity"] == "error" or one["kind"] in _BROKEN
        if same in told or not (is_error or one["kind"] in _DOUBTFUL):
            continue
        told.add(same)
        (errors if is_error else doubts).setdefault((one["kind"], one["target"]), []).append(one)
    return errors, doubts


def _refused(seen: Seen) -> Iterator[Check]:
    """Groups whose savings are refused since their counters contradict each other."""
    for group in seen.savings["groups"] if seen.savings else ():
        if group["status"] == "unreconciled":
            message = (group["reasons"] or ["the engine's own counters contradict each other"])[0]
            yield Check("reconcile", group["by"], "failed", message, "", None, _NONE, "MEASURED", _DISTRUST)


def _contradiction(kind: str, target: str, found: Sequence[Mapping[str, str]], *, is_error: bool) -> Check:
    more = f", and {len(found) - 1} more like it" if len(found) > 1 else ""
    message = f"{kind} at {found[0]['start']}{more}: {found[0]['message']}"
    about = target or "ledger"
    if is_error:
        count = Found(len(found), "errors")
        return Check("reconcile", {}, "failed", message, about, count, _NONE, "MEASURED", _DISTRUST)
    return Check("reconcile", {}, "ok", message, about, Found(len(found), "findings"), None, "MEASURED", warning=True)


def _sound(audited: Audited | None) -> str:
    if audited is None:
        return "no error is noted in the window; the ledger itself was not audited (`--audit` does)"
    return f"no error is noted in the window, and an audit of {audited.intervals:,} intervals finds none in it"


def coverage(asked: Asked, cost: Mapping[str, Any]) -> Iterator[Check]:
    """How much of the time between an engine's first and last interval was watched."""
    for group in cost["groups"]:
        if is_unheld(group):
            continue
        by, share, bound = group["by"], group["coverage"], Bound("at_least", asked.coverage_min)
        if share is None:
            yield Check("coverage", by, "unknown", "no time of an engine in the window", "", None, bound)
            continue
        away, total = _away(group, cost["findings"]), sum(group["engine_seconds"][state] for state in STATES)
        share = min(1.0, round(share + away / total, 6)) if away else share
        found = Found(share, "share")
        message = f"{share:.1%} of the engines' time was watched"
        message += f", but for {away:,.0f} s in which they were down or starting" if away else ""
        if share >= asked.coverage_min:
            yield Check("coverage", by, "ok", message, "", found, bound, "MEASURED")
            continue
        why = said(_of_engines(cost["findings"]), _GAPS, by)
        message += f", less than {asked.coverage_min:.1%}" + (f": {why}" if why else "")
        hint = "`kvtally run` has to run all the time and reach every engine: `kvtally doctor`"
        yield Check("coverage", by, "failed", message, "", found, bound, "MEASURED", hint)


def _away(group: Mapping[str, Any], findings: Sequence[Mapping[str, str]]) -> float:
    """Seconds in which nothing could be watched: kvtally asked, and an engine was down or starting."""
    seconds, share = group["engine_seconds"], group["coverage"]
    failed = of_group(_of_engines(findings), ("scrapes_failed",), group["by"])
    asked = sum(span_seconds(one) for one in failed)
    missing = (1 - share) * sum(seconds[state] for state in STATES)
    return float(min(asked, missing, seconds["warm_up"] + seconds["unallocated"]))


def _of_engines(findings: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Findings about engines, their pages or the whole ledger: a driver that does not answer hides no engine."""
    return [one for one in findings if one["target"].startswith(("engine:", "engine/")) or not one["target"]]


def sources(seen: Seen) -> Iterator[Check]:
    """Engines of the window that are no longer heard of, while the ledger goes on."""
    newest_ns = seen.newest_ns
    if not seen.is_live or not seen.sources or newest_ns is None:
        return
    gone = [one for one in seen.sources if newest_ns - one.end_ns > _patience_ns(one)]
    for one in gone:
        late, bound = (newest_ns - one.end_ns) / 1e9, _patience_ns(one) / 1e9
        message = f"nothing was heard of this engine for {late:,.0f} s, up to the ledger's newest scrape"
        hint = "`kvtally doctor` says whether it answers; for one that was shut down on purpose: --skip sources"
        found = Found(round(late, 3), "seconds")
        yield Check(
            "sources", {}, "failed", message, f"engine/{one.name}", found, Bound("at_most", bound), "MEASURED", hint
        )
    if not gone:
        late = max(newest_ns - one.end_ns for one in seen.sources) / 1e9
        found, least = Found(round(late, 3), "seconds"), min(_patience_ns(one) for one in seen.sources) / 1e9
        message = f"{plural(len(seen.sources), 'engine')}, each heard of up to the ledger's newest scrape"
        yield Check("sources", {}, "ok", message, "", found, Bound("at_most", least), "MEASURED")


def _patience_ns(source: Source) -> int:
    return max(LATE_NS, LATE_INTERVALS * source.interval_ns)


def fresh(asked: Asked, seen: Seen) -> Iterator[Check]:
    """The age of the ledger's newest scrape by the clock."""
    if asked.fresh_ns is None:
        return
    hint, limit = "is `kvtally run` alive? its log says why it does not write", asked.fresh_ns / 1e9
    bound = Bound("at_most", limit)
    if seen.newest_ns is None:
        yield Check("fresh", {}, "failed", "nothing was ever scraped into this ledger", "", None, bound, hint=hint)
        return
    age = (seen.now_ns - seen.newest_ns) / 1e9
    found, message = Found(round(age, 3), "seconds"), f"the ledger's newest scrape is {age:,.0f} s old"
    if age > limit:
        yield Check("fresh", {}, "failed", message, "", found, bound, "MEASURED", hint)
    elif age < -limit:
        message = f"the ledger's newest scrape lies {-age:,.0f} s ahead of this clock: one of the two clocks is wrong"
        yield Check("fresh", {}, "unknown", message, "", found, bound)
    else:
        yield Check("fresh", {}, "ok", message, "", found, bound, "MEASURED")
