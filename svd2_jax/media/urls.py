"""URLs of streams: what is one, and how it is shown."""

from __future__ import annotations

import re
from pathlib import Path

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://.")  # two letters at least: C:\ is a drive
# Up to the last @, as a password may hold one; digits before a slash are a port, and their @ is in the path.
_PASSWORD = re.compile(r"(://[^:@/?#\[]*):(?!\d+([/?#]|$)).*@")
_SECRET = re.compile(r"([?&](?:pass|pwd|token|key|secret)[^=&]*=)[^&]*", re.IGNORECASE)


def scheme_of(text: str) -> str | None:
    """Returns the scheme of a URL in lower case, such as "rtsp"; None for the name of a file."""
    found = _URL.match(text)
    return found[1].lower() if found else None


def path_or_url(text: str) -> Path | str:
    """Returns a URL as it is and anything else, colons or not, as the path of a file."""
    return text if scheme_of(text) else Path(text)


def masked(url: str) -> str:
    """Returns a URL without its passwords, for messages: `rtsp://user:***@host`, `srt://host:9?passphrase=***`."""
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))
