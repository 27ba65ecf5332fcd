"""What KV loads took: bytes, seconds and bandwidth of every cache, and of the mounts that hold them (TELEMETRY 5).

Two figures for a mount. `app_bytes`: what programs read through the filesystem, by the cache's own counter where the
mount holds nothing else that is counted, else by the filesystem's. `device_bytes`: what came from the device or the
server. The share of the first that the second lacks was read from a page cache, which is DRAM and not storage.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import widened
from kvtally.agent.finding import Finding
from kvtally.agent.grouping import default_window, finding_json, window_json
from kvtally.agent.joins import named_engines
from kvtally.agent.ledger.totals import Total, added, totals
from kvtally.agent.model_shape import shape_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from kvtally.agent.accounts import Window
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.collectors.base import Kind

GIGA = 10**9
_PLACES = 4


class _Named(NamedTuple):
    """A target of one name over all its attributes, those of its newest row."""

    name: str
    attributes: Mapping[str, str]
    total: Total

    def get(self, quantity: str) -> int | None:
        return self.total.counted[quantity]


def storage_report(reader: LedgerReader, window: Window | None) -> dict[str, Any]:
    """The answer of `kvtally storage` as plain values; with no window, the default one of CLI.md."""
    extent = reader.extent()
    if extent is None:
        return {"window": window_json(None, 0), "caches": [], "mounts": [], "findings": []}
    asked = widened(window or default_window(extent), reader.raw_from(), extent[1])
    asked = asked._replace(start_ns=max(asked.start_ns, extent[0]))
    targets = reader.targets()
    caches = _named(reader, "cache", asked, targets)
    filesystems = _named(reader, "filesystem", asked, targets)
    kv_bytes = _kv_bytes(targets)
    hosts = {target.name.partition("/")[0] for target in targets.values() if target.kind == "engine"}
    answers = [_cache(one, kv_bytes, hosts) for one in caches]
    mounts = [one for one in filesystems if one.attributes.get("paths")]
    findings: list[Finding] = []
    read = _read_by_caches(caches) if len(mounts) == 1 else None
    shown = [_mount(one, read, asked, findings) for one in mounts]
    shown += [_mount(one, None, asked, findings) for one in filesystems if one not in mounts]
    covered = max((one.total.length_ns for one in (*caches, *filesystems)), default=0)
    return {
        "window": window_json(asked, covered),
        "caches": answers,
        "mounts": shown,
        "findings": [finding_json(finding) for finding in findings],
    }


def _named(reader: LedgerReader, kind: Kind, window: Window, targets: Mapping[int, Target]) -> list[_Named]:
    found: dict[str, _Named] = {}
    for target_id, total in sorted(totals(reader, kind, *window).items()):
        target = targets[target_id]
        before = found.get(target.name)
        so_far = total if before is None else added(before.total, total)
        found[target.name] = _Named(target.name, target.attributes, so_far)
    return [found[name] for name in sorted(found)]


def _kv_bytes(targets: Mapping[int, Target]) -> dict[str, float]:
    """Bytes of KV for a token, by engine, where the shape of its model is known."""
    found: dict[str, float] = {}
    for target in targets.values():
        if target.kind == "engine" and target.attributes.get("shape"):
            try:
                shape = shape_of(json.loads(target.attributes["shape"]))
            except ValueError:  # a shape that is not known is one of these
                continue
            found[target.name.partition("/")[0]] = shape.kv_bytes_per_token
    return found


def _cache(one: _Named, kv_bytes: Mapping[str, float], hosts: Collection[str]) -> dict[str, Any]:
    own_host = one.name.partition("/")[0]  # of a cache on an engine's own page: the engine
    engines = named_engines(one.attributes) or ([own_host] if own_host in hosts else [])
    sizes = {kv_bytes.get(name.partition("/")[0]) for name in engines}
    token_bytes = sizes.pop() if len(sizes) == 1 else None

    def moved(prefix: str, tokens: str | None, operations: str | None) -> dict[str, Any]:
        moved_bytes, basis = one.get(f"{prefix}_bytes"), "MEASURED"
        counted = None if tokens is None else one.get(tokens)
        if moved_bytes is None and counted is not None and token_bytes is not None:
            # caches pad to whole chunks, so they move a little more
            moved_bytes, basis = round(counted * token_bytes), "MODELLED"
        told = _moved(moved_bytes, one.get(f"{prefix}_ns"), None if operations is None else one.get(operations))
        return {**told, "basis": None if moved_bytes is None else basis}

    return {
        "name": one.name,
        "cache": one.attributes.get("cache") or one.attributes.get("source"),
        "engines": engines,
        "tokens": {
            "looked_up": one.get("lookup_tokens"),
            "found": one.get("lookup_hit_tokens"),
            "found_in_dram": one.get("dram_hit_tokens"),
            "found_on_storage": one.get("disk_hit_tokens"),
            "loaded": one.get("loaded_tokens"),
            "stored": one.get("stored_tokens"),
        },
        "load": moved("load", "loaded_tokens", "loads"),
        "store": moved("store", "stored_tokens", "stores"),
        "storage_read": moved("storage_read", "disk_hit_tokens", None),
        "storage_write": moved("storage_write", None, None),
    }


def _moved(moved_bytes: int | None, took_ns: int | None, operations: int | None) -> dict[str, Any]:
    """Bytes, seconds, and what follows from both; null where the source does not tell."""
    took_seconds = None if took_ns is None else took_ns / 1e9
    return {
        "bytes": moved_bytes,
        "seconds": took_seconds,
        "operations": operations,
        "gigabytes_per_second": round(moved_bytes / GIGA / took_seconds, _PLACES)
        if moved_bytes and took_seconds
        else None,
        "mean_milliseconds": round(took_seconds * 1000 / operations, _PLACES) if took_seconds and operations else None,
    }


def _read_by_caches(caches: Iterable[_Named]) -> int | None:
    """What caches count as read from storage; None for nothing, since some count a part of their storage alone."""
    return sum(one.get("storage_read_bytes") or 0 for one in caches) or None


def _mount(one: _Named, read_by_caches: int | None, window: Window, findings: list[Finding]) -> dict[str, Any]:
    own, device_bytes = one.get("app_read_bytes"), one.get("read_bytes")
    app_bytes = read_by_caches if read_by_caches is not None else own
    source = one.attributes.get("source", "")
    share = None
    if app_bytes and device_bytes is not None:
        if device_bytes <= app_bytes:
            share = round(1 - device_bytes / app_bytes, _PLACES)
        else:
            message = (
                f"{device_bytes:,} bytes came from the device and programs asked for {app_bytes:,}: something else "
                "reads there, or is read ahead, so no share of a page cache follows"
            )
            findings.append(Finding("more_read_than_asked", "info", f"filesystem/{one.name}", *window, message))
    return {
        "name": one.name,
        "fstype": one.attributes.get("fstype"),
        "mounts": one.attributes.get("mounts"),
        "kv_paths": [path for path in one.attributes.get("paths", "").split(",") if path],
        "app_bytes": app_bytes,
        "app_bytes_source": "the cache's own counter"
        if read_by_caches is not None
        else source
        if own is not None
        else None,
        "device_bytes": device_bytes,
        "device_bytes_source": source if device_bytes is not None else None,
        "page_cache_share": share,
        "read": _moved(device_bytes if device_bytes is not None else own, one.get("read_ns"), one.get("reads")),
        "write": _moved(one.get("write_bytes"), one.get("write_ns"), one.get("writes")),
        "mean_read_bytes_per_second": None
        if device_bytes is None or not one.total.length_ns
        else round(device_bytes * 1e9 / one.total.length_ns),
    }
