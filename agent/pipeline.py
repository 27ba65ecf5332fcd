"""Scrapes in, ledger rows out: the same steps for a live deployment and for a recording."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from kvtally.agent.finding import Finding
from kvtally.agent.interval import RESET, State, appeared, born, close, opened
from kvtally.agent.ledger.append import Closed
from kvtally.agent.ledger.errors import LedgerError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    from kvtally.agent.interval import Interval
    from kvtally.collectors.base import Reading, Scrape

Key = tuple[str, str]
_K = TypeVar("_K")
_V = TypeVar("_V")

UNWRITTEN_MAX = 1000
_NANO = 1_000_000_000
STILL_NS = 60 * _NANO  # a cache that moves nothing closes an interval this often
_FROM_FIRST_COUNT = frozenset({"cache", "gateway"})  # kinds whose targets a page shows once they have counted
SOURCE_TARGETS_MAX = 1024  # of one page: one with ever new models must not fill the memory and the ledger,
TARGETS_MAX = 8192  # nor take the room of other pages' targets
FORGOTTEN_NS = 24 * 3600 * _NANO  # pods come and go: what was not read for so long makes room, and the ledger knows it
_FORGET_EVERY_NS = 3600 * _NANO  # what may make room is looked for this often at most
_KEPT = "counters are cumulative, so the interval across it holds what was counted"


class Writer(Protocol):
    """Where ticks are written: whole, or not at all."""

    def append(self, batch: Iterable[Closed], findings: Iterable[Finding] = ()) -> None:
        """Write one tick; LedgerError if it cannot be."""
        ...

    def skip(self, by_ns: int, finding: Finding) -> None:
        """Move every target's last scrape forward; LedgerError if that cannot be written."""
        ...

    def recall(self, kind: str, name: str) -> State | None:
        """The last raw counters of a target; None if there are none. LedgerError if they cannot be read."""
        ...


class Tick(NamedTuple):
    """What came of a tick: the intervals that were written, and findings among them."""

    closed: tuple[Closed, ...]
    findings: tuple[Finding, ...]
    error: LedgerError | None = None


class Pipeline:
    """Keeps the last raw counters of every target; they move on only once the ledger has them.

    So a ledger that cannot be written for a while loses nothing: the next interval that can be written covers the
    whole time, and says how many scrapes it missed.
    """

    def __init__(
        self,
        writer: Writer,
        states: Mapping[Key, State],
        described: Callable[[Sequence[Reading]], Iterable[Reading]],
        *,
        interval_ns: int | None,
        started_ns: int,
    ) -> None:
        """`interval_ns` is the cadence of a live run, None in a replay; `started_ns` when this run began.

        `states` need not be all: those of another target are asked of the writer when it is read first.
        """
        self._writer = writer
        self._states = dict(states)
        self._described = described
        self._interval_ns = interval_ns
        self._started_ns = started_ns
        self._sources: dict[Key, str] = {}
        self._missed: dict[Key, int] = {}
        self._down: dict[str, tuple[int, str]] = {}  # source -> when it first failed, and why
        # of ticks that could not be written
        self._unopened: dict[Key, Closed] = {}
        self._unwritten: list[Finding] = []
        self._crowded: set[str] = set()
        self._watched: dict[str, int] = {}  # source -> when its page was last seen
        self._appeared: dict[Key, int] = {}  # targets not in the ledger yet -> when their page did not show them
        self._still: dict[Key, tuple[int, int]] = {}  # caches that moved nothing: how many scrapes, and the last
        self._forgot_ns = started_ns
        self._is_behind = False  # the last tick could not be written
        self._unread: LedgerError | None = None  # why a target's state could not be asked for in this tick

    @property
    def states(self) -> Mapping[Key, State]:
        """Last raw counters by (kind, name)."""
        return self._states

    def tick(self, scrapes: Sequence[Scrape], extra: Sequence[Finding] = ()) -> Tick:
        """Close one interval for every target that was read, and write them in one transaction."""
        self._forget(scrapes)
        closed = list(self._unopened.values())
        once = [*self._unwritten, *extra]
        gaps: dict[str, Finding] = {}
        states = {_key(one.reading): one.state for one in closed}
        self._unread = None
        for scrape in scrapes:
            if scrape.outcome != "ok":
                self._failed(scrape)
                if scrape.outcome == "no_data":
                    self._watched[scrape.source] = scrape.taken_at_ns
                continue
            own = list(self._closed(scrape, states, once))
            if scrape.source in self._down:
                gaps[scrape.source] = self._gap(scrape, own)
            closed += own
            self._watched[scrape.source] = scrape.taken_at_ns
        findings = [*once, *gaps.values()]
        if not closed and not findings:
            return Tick((), (), self._unread)
        try:
            self._writer.append(closed, findings)
        except LedgerError as error:
            self._is_behind = True
            self._keep(closed, once)
            return Tick((), (), error)
        self._is_behind = False
        self._unopened, self._unwritten = {}, []
        self._states |= states
        for key in states:
            self._missed.pop(key, None)
            self._still.pop(key, None)
            self._appeared.pop(key, None)
        for source in gaps:
            del self._down[source]
        return Tick(tuple(closed), tuple(findings), self._unread)

    def _forget(self, scrapes: Sequence[Scrape]) -> None:
        """Make room where many targets have come and gone; one that comes back goes on from what the ledger has."""
        many = min(TARGETS_MAX, SOURCE_TARGETS_MAX // 2)  # before any page is full
        if max(len(self._sources), len(self._watched), len(self._down)) < many or self._is_behind:
            return
        now_ns = max((one.taken_at_ns for one in scrapes), default=0)
        if now_ns - self._forgot_ns < _FORGET_EVERY_NS:
            return
        self._forgot_ns = now_ns
        before_ns = now_ns - FORGOTTEN_NS
        kept = {
            key
            for key, state in self._states.items()
            if max(state.taken_at_ns, self._still.get(key, (0, 0))[1]) >= before_ns
        }
        self._sources = _only(kept, self._sources)
        self._states = _only(kept, self._states)
        self._missed = _only(kept, self._missed)
        self._still = _only(kept, self._still)
        self._appeared = _only(self._sources, self._appeared)
        current = {*self._sources.values(), *(one.source for one in scrapes)}
        self._down = _only(current, self._down)
        current |= {source for source, at_ns in self._watched.items() if at_ns >= before_ns}
        self._watched = _only(current, self._watched)
        self._crowded.clear()

    def _closed(self, scrape: Scrape, states: dict[Key, State], findings: list[Finding]) -> Iterator[Closed]:
        """Close what a scrape read; `states` are those of this tick, which go before the ones that are written."""
        seen: set[Key] = set()
        room: int | None = None
        for reading in self._described(scrape.readings):
            key = _key(reading)
            if key not in self._sources:
                room = self._room(scrape.source) if room is None else room - 1
                if room <= 0:
                    if scrape.source not in self._crowded:
                        self._crowded.add(scrape.source)
                        findings.append(_crowded(scrape))
                    continue
            seen.add(key)
            try:
                previous = states.get(key) or self._states.get(key) or self._recalled(key)
                closed = self._close(key, reading, scrape, previous, findings)
            except LedgerError as error:
                self._unread = error  # it is asked again at the next tick: the counters are cumulative
                continue
            for one in closed:
                states[key] = one.state
                yield one
        self._miss(scrape.source, but=seen)

    def _room(self, source: str) -> int:
        """How many more targets a source may have."""
        own = sum(of == source for of in self._sources.values())
        return min(SOURCE_TARGETS_MAX - own, TARGETS_MAX - len(self._sources))

    def _miss(self, source: str, but: Container[Key] = ()) -> None:
        """Count a scrape that gave nothing of a source's targets; live, the cadence tells how many there were."""
        if self._interval_ns:
            return
        for key, of in self._sources.items():
            if of == source and key not in but:
                self._missed[key] = self._missed.get(key, 0) + 1

    def _recalled(self, key: Key) -> State | None:
        """The state that the ledger has of a target that is new here."""
        if key in self._sources:
            return None
        state = self._writer.recall(*key)
        if state is not None:
            self._states[key] = state
        return state

    def _keep(self, closed: Iterable[Closed], once: Sequence[Finding]) -> None:
        """Keep what the next tick could not find again: first scrapes, and findings that are made once."""
        for one in closed:
            if one.interval is None:
                self._unopened[_key(one.reading)] = one
        for key in {_key(one.reading) for one in closed if one.interval is not None}:
            self._missed[key] = self._missed.get(key, 0) + 1
        self._unwritten = [*once[:UNWRITTEN_MAX]]

    def skip(self, by_ns: int, finding: Finding) -> None:
        """Leave out a step of the clock: every open interval starts after it. LedgerError if it cannot be written."""
        self._writer.skip(by_ns, finding)
        self._states = {key: _later(state, by_ns) for key, state in self._states.items()}
        self._unopened = {key: one._replace(state=_later(one.state, by_ns)) for key, one in self._unopened.items()}
        self._watched = {source: at_ns + by_ns for source, at_ns in self._watched.items()}
        self._appeared = {key: at_ns + by_ns for key, at_ns in self._appeared.items()}
        self._still = {key: (scrapes, at_ns + by_ns) for key, (scrapes, at_ns) in self._still.items()}

    def _close(
        self, key: Key, reading: Reading, scrape: Scrape, previous: State | None, findings: list[Finding]
    ) -> list[Closed]:
        new = key not in self._sources
        if new and previous is None and (since_ns := self._not_shown(key, reading, scrape)) is not None:
            self._appeared[key] = since_ns
        self._sources[key] = scrape.source
        if previous is None:
            return [self._first(key, reading, scrape)]
        if scrape.taken_at_ns <= previous.taken_at_ns:
            if new and self._interval_ns:
                # a recording that is replayed again says so itself
                findings.append(_out_of_order(key, scrape.taken_at_ns, previous.taken_at_ns))
            return []
        if _is_still(previous, reading):
            scrapes, _ = self._still.get(key, (0, 0))
            self._still[key] = (scrapes + 1, scrape.taken_at_ns)
            if scrape.taken_at_ns - previous.taken_at_ns < STILL_NS:
                return []
            return [self._still_closed(key, reading, previous)]
        closed: list[Closed] = []
        if key in self._still:
            closed.append(self._still_closed(key, reading, previous))
            previous = closed[0].state
        missed = self._missed_since(key, previous, scrape.taken_at_ns, 1)
        interval, state, found = close(previous, reading, scrape.taken_at_ns, missed)
        if self._interval_ns and new and missed and reading.kind == "engine":
            findings.append(_not_watched(key, interval, self._started_ns))
        return [*closed, Closed(reading, interval, state, found)]

    def _first(self, key: Key, reading: Reading, scrape: Scrape) -> Closed:
        """What the first scrape of a target counts: all where it began while its page was watched, else nothing."""
        first = born(reading, scrape.taken_at_ns, self._started_ns)
        since_ns = self._appeared.get(key)
        if first is None and since_ns is not None and since_ns < scrape.taken_at_ns:
            first = appeared(reading, since_ns, scrape.taken_at_ns)
        return Closed(reading, None, opened(reading, scrape.taken_at_ns)) if first is None else Closed(reading, *first)

    def _not_shown(self, key: Key, reading: Reading, scrape: Scrape) -> int | None:
        """When the page of a new target was last seen without it; None if it may have counted before that.

        Caches and gateways are there from their first count on, a replica of Ray's has an id of its own. A target that
        was named less closely while it was alone on its page is no new one.
        """
        kind, name = key
        since_ns = self._watched.get(scrape.source)
        if since_ns is None or (kind not in _FROM_FIRST_COUNT and "replica" not in reading.attributes):
            return None
        known = self._states.keys() | self._sources.keys()
        parts = name.split("/")
        wider = {(kind, "/".join(parts[:count])) for count in range(1, len(parts) + 1)}
        closer = f"{name}/"
        if not wider.isdisjoint(known) or any(of == kind and other.startswith(closer) for of, other in known):
            return None
        return None if any(self._writer.recall(*one) for one in wider) else since_ns

    def _missed_since(self, key: Key, previous: State, until_ns: int, taken: int) -> int:
        """Scrapes that were due since the previous one and gave nothing; `taken` is how many gave something."""
        if not self._interval_ns:
            return self._missed.get(key, 0)
        # live, the cadence tells what was due: ticks that failed, that came late, or while no kvtally ran
        return max(0, round((until_ns - previous.taken_at_ns) / self._interval_ns) - taken)

    def _still_closed(self, key: Key, reading: Reading, previous: State) -> Closed:
        """Close the time in which a cache moved nothing, up to the last scrape that says so."""
        scrapes, until_ns = self._still[key]
        missed = self._missed_since(key, previous, until_ns, scrapes) if self._interval_ns else 0
        # all of it as it was: a server that began anew since then has another epoch, and would count its old sums again
        same = reading._replace(
            values=previous.values,
            epoch=previous.epoch,
            session=previous.session,
            detail_names=previous.detail_names,
            details=previous.details,
        )
        return Closed(same, *close(previous, same, until_ns, missed))

    def _failed(self, scrape: Scrape) -> None:
        if scrape.outcome == "failed":
            self._down.setdefault(scrape.source, (scrape.taken_at_ns, scrape.reason))
        self._miss(scrape.source)

    def _gap(self, scrape: Scrape, closed: Sequence[Closed]) -> Finding:
        since_ns, reason = self._down[scrape.source]
        lost = any(one.interval is not None and one.interval.flags & RESET for one in closed)
        kept = "it restarted meanwhile" if lost else _KEPT
        return Finding(
            "scrapes_failed",
            "info",
            scrape.source,
            since_ns,
            scrape.taken_at_ns,
            f"it could not be read for {(scrape.taken_at_ns - since_ns) / 1e9:.1f} s ({reason}); {kept}",
        )


def _is_still(previous: State, reading: Reading) -> bool:
    """Whether a cache has moved nothing: LMCache flushes its counters every 10 s, and rows of zeros say nothing."""
    return (
        reading.kind == "cache"
        and not previous.behind
        and (reading.values, reading.epoch, reading.session) == (previous.values, previous.epoch, previous.session)
        and (reading.detail_names, reading.details) == (previous.detail_names, previous.details)
    )


def _only(kept: Container[_K], of: Mapping[_K, _V]) -> dict[_K, _V]:
    return {key: value for key, value in of.items() if key in kept}


def _later(state: State, by_ns: int) -> State:
    return state._replace(taken_at_ns=state.taken_at_ns + by_ns)


def _key(reading: Reading) -> Key:
    return reading.kind, reading.name


def _crowded(scrape: Scrape) -> Finding:
    return Finding(
        "too_many_targets",
        "error",
        scrape.source,
        scrape.taken_at_ns,
        scrape.taken_at_ns,
        f"it shows more targets than are counted at a time ({SOURCE_TARGETS_MAX} of one page, {TARGETS_MAX} in all): "
        "new ones are left out; look at its labels",
    )


def _out_of_order(key: Key, taken_at_ns: int, before_ns: int) -> Finding:
    return Finding(
        "scrape_out_of_order",
        "warning",
        "/".join(key),
        taken_at_ns,
        before_ns,
        "a scrape is not later than the one before it, and was left out: the ledger has this time already",
    )


def _not_watched(key: Key, interval: Interval, started_ns: int) -> Finding:
    """Of an engine that this run reads for the first time, long after the scrape before."""
    from_ns, to_ns, who = interval.start_ns, interval.end_ns, "it was not read"
    if from_ns < started_ns:  # what passed between our start and its page is the engine's own time
        to_ns, who = min(to_ns, started_ns), "no kvtally ran"
    kept = "the engine restarted meanwhile" if interval.flags & RESET else _KEPT
    message = f"{who} for {(to_ns - from_ns) / 1e9:.1f} s; {kept}"
    return Finding("not_watched", "info", "/".join(key), from_ns, to_ns, message)
