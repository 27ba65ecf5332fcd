"""The API's key: from a file or an environment variable, never from a command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvtally.agent.config_file import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY_BYTES_MAX = 4096


def read_key(file: str | None, variable: str | None, environ: Mapping[str, str]) -> str:
    """The key in a file, else in the environment variable of a name; "" where neither is given.

    ConfigError if what is given holds no key; the key stands in no message.
    """
    if file is not None:
        where = file
        try:
            with Path(file).open("rb") as opened:
                key = opened.read(_KEY_BYTES_MAX + 1).decode("utf-8", "replace").strip()
        except OSError as error:
            raise ConfigError(file, f"the API's key cannot be read: {error.strerror}") from None
    elif variable is not None:
        where, key = f"${variable}", environ.get(variable, "").strip()
    else:
        return ""
    if not key or len(key) > _KEY_BYTES_MAX or not all("!" <= each <= "~" for each in key):
        raise ConfigError(where, "holds no API key", "a key is one line of printable ASCII without blanks")
    return key
