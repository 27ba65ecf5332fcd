from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from kvtally.agent import target_files
from kvtally.agent.config import Access, Config, Engine, Labels, Page, Rates, Scrape, complete
from kvtally.agent.target_files import TargetFiles

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def write(path: Path, *addresses: str, **labels: str) -> None:
    """Replace the file at one stroke, as a tool that is careful does it."""
    write_text(path, json.dumps([{"targets": addresses, "labels": labels}]))


def write_text(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def files(folder: Path, pattern: str = "*.json", **others: Any) -> TargetFiles:
    return TargetFiles(Config(scrape=Scrape(file_sd=(str(folder / pattern),)), **others))


def names(watched: TargetFiles) -> list[str]:
    return [engine.name for engine in watched.look().engines]


def test_without_files_there_is_nothing_to_read_or_to_complain_of() -> None:
    assert TargetFiles(Config()).look() == ((), (), ())


def test_engines_and_pages_of_all_files_are_completed(tmp_path: Path) -> None:
    write(tmp_path / "b.json", "b:8000", tenant="search")
    write(tmp_path / "a.json", "a:7000", kvtally_kind="page", kvtally_engines="b:8000")
    access = Access(ca_file="/etc/ca.pem")
    scrape = Scrape(file_sd=(str(tmp_path / "*.json"),), file_sd_access=access)
    found = TargetFiles(Config(scrape=scrape, labels=Labels("fra1"), rates=Rates(term="owned"))).look()
    assert found.pages == (Page("http://a:7000/metrics", "a:7000", ("b:8000",), access),)
    (engine,) = found.engines
    assert (engine.url, engine.name, engine.term) == ("http://b:8000/metrics", "b:8000", "owned")
    assert (engine.labels, engine.access) == (Labels("fra1", "", "search"), access)
    assert found.complaints == ()


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    watched = files(tmp_path)
    write(tmp_path / "a.json", "a:1")
    assert names(watched) == ["a:1"]
    write(tmp_path / "a.json", "a:1", "a:2")
    write(tmp_path / "b.json", "b:1")
    assert names(watched) == ["a:1", "a:2", "b:1"]


def test_a_file_that_does_not_change_is_not_read_again(tmp_path: Path) -> None:
    """Its content is changed behind its mark: that it is not seen shows that the file was not read."""
    path = tmp_path / "a.json"
    watched = files(tmp_path)
    write(path, "a:1")
    os.utime(path, ns=(0, 0))
    assert names(watched) == ["a:1"]
    with path.open("r+") as file:
        file.write(path.read_text().replace("a:1", "a:2"))
    os.utime(path, ns=(0, 0))
    assert names(watched) == ["a:1"]
    os.utime(path, ns=(0, 1))
    assert names(watched) == ["a:2"]


def test_a_file_that_is_gone_loses_its_targets(tmp_path: Path) -> None:
    watched = files(tmp_path)
    write(tmp_path / "a.json", "a:1")
    write(tmp_path / "b.json", "b:1")
    assert names(watched) == ["a:1", "b:1"]
    (tmp_path / "a.json").unlink()
    assert names(watched) == ["b:1"]
    (tmp_path / "b.json").unlink()
    assert watched.look() == ((), (), (f"{tmp_path}/*.json: there is no such file",))


def test_a_broken_file_keeps_what_it_named_and_is_complained_of_once(tmp_path: Path) -> None:
    watched = files(tmp_path)
    write(tmp_path / "a.json", "a:1")
    watched.look()
    write_text(tmp_path / "a.json", '[{"targets": ["a:1", "a:')
    found = watched.look()
    assert [engine.name for engine in found.engines] == ["a:1"]
    reason = "not in the format of file_sd: Input data was truncated; what it named before still holds"
    assert found.complaints == (f"{tmp_path}/a.json: {reason}",)
    assert watched.look().complaints == ()
    assert watched.faults == {f"{tmp_path}/a.json": reason}
    write_text(tmp_path / "a.json", "[{}]")
    assert len(watched.look().complaints) == 1
    write(tmp_path / "a.json", "a:2")
    assert watched.look().complaints == ()
    assert watched.faults == {}
    assert names(watched) == ["a:2"]


def test_a_file_that_is_broken_from_the_start_names_nothing_and_stops_no_other(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "[{'a")
    write(tmp_path / "b.json", "b:1")
    found = files(tmp_path).look()
    assert [engine.name for engine in found.engines] == ["b:1"]
    assert found.complaints == (
        f"{tmp_path}/a.json: not in the format of file_sd: JSON is malformed: object keys must be strings (byte 2)",
    )


def test_the_end_of_a_name_tells_yaml_from_json(tmp_path: Path) -> None:
    write_text(tmp_path / "a.yml", "- targets: [a:1]\n")
    write_text(tmp_path / "b.yaml", "- targets: [b:1] # a comment\n")
    write_text(tmp_path / "c.json", "- targets: [c:1]\n")
    watched = files(tmp_path, "*.*")
    assert names(watched) == ["a:1", "b:1"]
    assert list(watched.faults) == [f"{tmp_path}/c.json"]
    write_text(tmp_path / "a.yml", "- targets: [a:1, *x]\n")
    found = watched.look()
    assert [engine.name for engine in found.engines] == ["a:1", "b:1"]
    reason = "anchors and aliases are not read (line 1); what it named before still holds"
    assert found.complaints == (f"{tmp_path}/a.yml: not in the format of file_sd: {reason}",)


def test_what_is_no_file_or_too_large_is_complained_of(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    write_text(tmp_path / "wide.json", "[" + " " * 2**20 + "]")
    write_text(tmp_path / "just.json", "[" + " " * (2**20 - 2) + "]")
    assert files(tmp_path).look().complaints == (
        f"{tmp_path}/folder.json: it is no file",
        f"{tmp_path}/pipe.json: it is no file",
        f"{tmp_path}/wide.json: it has more than 1048576 bytes",
    )


def test_a_link_that_leads_nowhere_is_as_a_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "gone")
    assert files(tmp_path).look() == ((), (), ())


def test_a_config_map_that_is_replaced_is_seen_through_its_links(tmp_path: Path) -> None:
    for version, address in (("..1", "a:1"), ("..2", "a:2")):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "a.json", address)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "a.json").symlink_to("..data/a.json")
    watched = files(tmp_path)
    assert names(watched) == ["a:1"]
    (tmp_path / "..fresh").symlink_to("..2")
    (tmp_path / "..fresh").replace(tmp_path / "..data")
    assert names(watched) == ["a:2"]


def test_a_file_that_two_patterns_name_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a.json", "a:1")
    scrape = Scrape(file_sd=(str(tmp_path / "a.json"), str(tmp_path / "*.json")))
    found = TargetFiles(Config(scrape=scrape)).look()
    assert len(found.engines) == 1
    assert found.complaints == ()


def test_a_target_that_two_files_or_the_config_name_is_read_once(tmp_path: Path) -> None:
    config = Config()
    listed = complete(Engine("http://c:1", "mine"), config)
    write(tmp_path / "a.json", "a:1", "c:1")
    write(tmp_path / "b.json", "a:1", "b:1")
    found = files(tmp_path, engines=(listed,)).look()
    assert [engine.name for engine in found.engines] == ["a:1", "b:1"]
    assert found.complaints == ()


def test_another_target_of_a_name_that_is_taken_is_left_out_and_complained_of_once(tmp_path: Path) -> None:
    write(tmp_path / "a.json", "a:1")
    write(tmp_path / "b.json", "a:1", __metrics_path__="/other", __param_token="hunter2")
    watched = files(tmp_path)
    found = watched.look()
    assert [engine.url for engine in found.engines] == ["http://a:1/metrics"]
    (complaint,) = found.complaints
    assert complaint.startswith(f'{tmp_path}/b.json, http://a:1/other: left out, "a:1" is in {tmp_path}/a.json too')
    assert '"instance"' in complaint
    assert watched.look().complaints == ()
    listed = complete(Engine("http://c:1", "a:1"), Config())
    assert files(tmp_path, engines=(listed,)).look().engines == ()


def test_files_and_targets_beyond_the_bounds_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_files, "FILES_MAX", 2)
    monkeypatch.setattr(target_files, "TARGETS_MAX", 3)
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.json", f"{name}:1", f"{name}:2")
    watched = files(tmp_path)
    assert names(watched) == ["a:1", "a:2", "b:1"]
    assert watched.faults == {"scrape.file_sd": "targets after the first 3 are left out"}
    monkeypatch.setattr(target_files, "TARGETS_MAX", 9)
    assert names(watched) == ["a:1", "a:2", "b:1", "b:2"]
    assert watched.faults == {"scrape.file_sd": "it names 3 files; those after the first 2 are left out"}


def test_a_change_is_seen_before_anybody_reads(tmp_path: Path) -> None:
    watched = files(tmp_path)
    assert not watched.has_changed()
    write(tmp_path / "a.json", "a:1")
    assert watched.has_changed()  # one came
    watched.look()
    assert not watched.has_changed()
    write(tmp_path / "a.json", "a:1", "a:2")
    assert watched.has_changed()  # one is another
    watched.look()
    (tmp_path / "a.json").unlink()
    assert watched.has_changed()  # one went
    watched.look()
    assert not watched.has_changed()
    assert not TargetFiles(Config()).has_changed()


def test_what_cannot_be_read_is_no_change_until_the_next_look_that_is_due(tmp_path: Path) -> None:
    """Else a broken link or a folder would have kvtally look around every five seconds for ever."""
    (tmp_path / "folder.json").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "..data")
    watched = files(tmp_path)
    watched.look()
    assert not watched.has_changed()
    write(tmp_path / "..data", "a:1")  # now it leads somewhere
    assert watched.has_changed()
    assert names(watched) == ["a:1"]
    assert not watched.has_changed()
    (tmp_path / "..data").unlink()
    assert watched.has_changed()
    assert names(watched) == []
    assert not watched.has_changed()


def test_a_file_that_could_not_be_read_is_tried_at_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights change without a mark: here a bound does, since root may read everything."""
    write(tmp_path / "a.json", "a:1")
    monkeypatch.setattr(target_files, "FILE_BYTES_MAX", 4)
    watched = files(tmp_path)
    assert names(watched) == []
    assert list(watched.faults.values()) == ["it has more than 4 bytes"]
    monkeypatch.setattr(target_files, "FILE_BYTES_MAX", 1 << 20)
    assert names(watched) == ["a:1"]
    assert watched.faults == {}
