"""Addresses of folders elsewhere: told from paths, refused where they hold a secret. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from shards.errors import UserError

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FIX: Final = (
    "leave them out; credentials come from the environment: ~/.netrc for http(s), AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY or a profile for s3, GOOGLE_APPLICATION_CREDENTIALS for gs, FSSPEC_... for others"
)


def is_url(place: str | Path) -> bool:
    """Whether it is an address, and no path."""
    return isinstance(place, str) and _URL.match(place) is not None


def check_url(url: str, key: str) -> None:
    """Refuse an address with credentials in it: it is written into run folders, reports and logs.

    Args:
        url: an address; a path passes.
        key: what it was given as, for the message.

    Raises:
        UserError: it holds a user, a password, a query or a fragment; the message shows none of them.
    """
    if not is_url(url):
        return
    parts = _split(url, key)
    held = [
        name
        for name, there in (
            ("a user or a password", "@" in parts.netloc),
            ("a query", bool(parts.query)),
            ("a fragment", bool(parts.fragment)),
        )
        if there
    ]
    if held:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UserError(f"the address in {key} holds {' and '.join(held)}", fix=_FIX, file=shown)
    if not parts.netloc and parts.scheme != "file":
        raise UserError(f"{key} is {url!r}", fix="give a whole address, for example https://host/folder")


def as_path(place: str | Path) -> Path | None:
    """The folder on this machine that a path or a file:// address names; None for other addresses."""
    if isinstance(place, Path):
        return place.absolute()
    if not is_url(place):
        return Path(place).absolute()
    parts = _split(place, "the address")
    return Path(unquote(parts.path)).absolute() if parts.scheme == "file" else None


def _split(url: str, key: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise UserError(f"{key} is no address ({error})", fix="give an address such as https://host/folder") from None
