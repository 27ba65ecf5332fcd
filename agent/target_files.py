"""The files that name engines and pages, read again when they change."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.config import Page, complete, complete_page
from kvtally.agent.file_sd import TARGETS_MAX, Targets, parse
from kvtally.agent.yaml_text import SUFFIXES
from kvtally.collectors.bounded_file import Mark, mark_of, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvtally.agent.config import Config, Engine

FILE_BYTES_MAX = 1 << 20
FILES_MAX = 256


class Look(NamedTuple):
    """What all files name now, completed; `complaints` are those that the look before did not have."""

    engines: tuple[Engine, ...]
    pages: tuple[Page, ...]
    complaints: tuple[str, ...]


class _File(NamedTuple):
    """A file as it was read last; `targets` are those of its last good content."""

    mark: Mark | None
    targets: Targets
    fault: str


class TargetFiles:
    """The files of `scrape.file_sd`, kept from one look to the next; `faults` is what is wrong now, by file."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._files: dict[str, _File] = {}
        self.faults: Mapping[str, str] = {}

    def look(self) -> Look:
        """Read the files that have changed; bounded in files, bytes and targets.

        A broken file keeps the targets of its last good content, and one that is gone loses them, as Prometheus does
        it. Engines and pages that config lists go before those of files.
        """
        faults: dict[str, str] = {}
        files = {path: self._read(path) for path in self._paths(faults)}
        self._files = {path: file for path, file in files.items() if file is not None}
        faults |= {path: file.fault for path, file in self._files.items() if file.fault}
        engines: list[Engine] = []
        pages: list[Page] = []
        for one in self._together(faults):
            if isinstance(one, Page):
                pages.append(one)
            else:
                engines.append(one)
        new = tuple(f"{where}: {text}" for where, text in faults.items() if self.faults.get(where) != text)
        self.faults = faults
        return Look(tuple(engines), tuple(pages), new)

    def has_changed(self) -> bool:
        """Whether a file is there that was not at the last look, or is gone, or is another; a `stat` for each."""
        if not self._config.scrape.file_sd:
            return False
        files = self._files  # a look in another thread may put others in their place
        paths = self._paths({})
        return not files.keys() <= set(paths) or any(_is_other(path, files.get(path)) for path in paths)

    def _paths(self, faults: dict[str, str]) -> list[str]:
        paths: dict[str, None] = {}
        for pattern in self._config.scrape.file_sd:
            matching = sorted(glob.glob(pattern))  # noqa: PTH207  # Path.glob takes no absolute pattern
            if not matching:
                faults[pattern] = "there is no such file"
            paths |= dict.fromkeys(matching)
        if len(paths) > FILES_MAX:
            faults["scrape.file_sd"] = f"it names {len(paths)} files; those after the first {FILES_MAX} are left out"
        return list(paths)[:FILES_MAX]

    def _read(self, path: str) -> _File | None:
        """The file as it is now, read only if it has changed; None where it is gone."""
        before = self._files.get(path)
        mark: Mark | None = None
        try:
            mark = mark_of(path)
            if before is not None and before.mark == mark:
                return before
            mark, content = read_bounded(path, FILE_BYTES_MAX)
            targets = parse(content, self._config.scrape.file_sd_access, is_yaml=path.endswith(SUFFIXES))
            return _File(mark, targets, "")
        except FileNotFoundError:
            return None
        except OSError as error:
            mark, fault = None, error.strerror or str(error)  # tried again at every look
        except ValueError as error:
            fault = str(error)
        targets = before.targets if before is not None else Targets()
        kept = "; what it named before still holds" if any(targets) else ""
        return _File(mark, targets, f"{fault}{kept}")

    def _together(self, faults: dict[str, str]) -> Iterator[Engine | Page]:
        """The targets of all files, each address and each name once."""
        config = self._config
        listed: tuple[Engine | Page, ...] = (*config.engines, *config.pages)
        addresses = {each.url for each in listed}
        owners = {each.name: "the config" for each in listed}
        count = 0
        for path, file in self._files.items():
            named: tuple[Engine | Page, ...] = (*file.targets.engines, *file.targets.pages)
            for one in named:
                whole = complete_page(one) if isinstance(one, Page) else complete(one, config)
                if whole.url in addresses:
                    continue  # Prometheus, too, scrapes once what two files name
                if owner := owners.get(whole.name):
                    hint = f'"{whole.name}" is in {owner} too: give it an "instance" of its own'
                    faults[f"{path}, {whole.url.partition('?')[0]}"] = f"left out, {hint}"
                    continue
                if count == TARGETS_MAX:
                    faults["scrape.file_sd"] = f"targets after the first {TARGETS_MAX} are left out"
                    return
                count += 1
                addresses.add(whole.url)
                owners[whole.name] = path
                yield whole


def _is_other(path: str, before: _File | None) -> bool:
    """Whether a file is another than it was; None: there was none, a link that leads nowhere.

    One that could not be read is left for the next look that is due.
    """
    if before is not None and before.mark is None:
        return False
    try:
        mark = mark_of(path)
    except OSError:
        return before is not None
    return before is None or mark != before.mark
