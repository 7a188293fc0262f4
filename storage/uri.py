"""URIs of storage: parsed, joined in their path, and shown without secrets."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

_KINDS = "s3|gs|gcs|hdfs|viewfs|abfs|abfss|file"
_MANGLED = re.compile(rf"({_KINDS}):/(?!/)(.*)")
_USER = re.compile(r"(\w://)[^?\s]*@")  # a secret may hold slashes
_SECRET = re.compile(r"((?:access_key|secret_key|session_token|secret|token|password|sig)=)[^&\s'\"]+", re.IGNORECASE)
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# One request for a small file, and no quarter of an hour of retries that no signal ends.
_DEFAULTS = {"s3": ("allow_delayed_open", "true"), "gs": ("retry_limit_seconds", "15")}


class StorageError(ValueError):
    """Storage at a URI that cannot be used: one sentence without secrets."""


def is_uri(place: object) -> bool:
    """Whether a place is a URI and not a path."""
    return "://" in str(place)


def refuse_mangled(place: object) -> None:
    """Refuse a URI that was made a path on the way, which takes one of its slashes.

    Raises:
        StorageError: it was.
    """
    if match := _MANGLED.match(str(place)):
        raise StorageError(f"{shown(str(place))} was a URI and became a path: give {match[1]}://… as text.")


def parse(uri: str) -> tuple[str, str, str]:
    """Scheme, quoted authority and path, and query of a URI as a person writes it.

    Spaces, letters of any language, `#` and a `%` that quotes nothing stand for themselves in the path.
    """
    scheme, _, rest = uri.partition("://")
    path, _, query = rest.partition("?")
    path = quote(_STRAY_PERCENT.sub("%25", path), safe="/:@!$&'()*+,;=~%[]")
    return scheme.lower(), path.rstrip("/") or "/", query.replace("#", "%23")


def join(uri: str, *names: str) -> str:
    """The URI of something below another: names are quoted and appended to the path; the query stays."""
    scheme, path, query = parse(uri)
    below = "/".join(quote(part, safe="~") for name in names for part in name.split("/") if part)
    whole = f"{scheme}://{path.rstrip('/')}/{below}".rstrip("/")
    return f"{whole}?{query}" if query else whole


def below(folder: str, name: str) -> str:
    """The path or URI of something in a folder, of which the one or the other is given."""
    return join(folder, name) if is_uri(folder) else f"{folder}/{name}"


def name_of(uri: str) -> str:
    """The last name in the path of a URI."""
    return unquote(parse(uri)[1].rpartition("/")[2])


def for_arrow(uri: str) -> str:
    """The URI as `pyarrow.fs` reads it."""
    scheme, path, query = parse(uri)
    if scheme in _DEFAULTS and f"{_DEFAULTS[scheme][0]}=" not in query:
        query = "&".join(filter(None, (query, "=".join(_DEFAULTS[scheme]))))
    return f"{scheme}://{path}?{query}" if query else f"{scheme}://{path}"


def shown(text: str) -> str:
    """A text, such as a URI or a sentence with one, whose secrets are masked."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1***@", text))
