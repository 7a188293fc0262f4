"""Who may ask the page, and with what: requests by a name of this machine, and values of the types that a box has."""

from __future__ import annotations

import html
import ipaddress
import math
import socket
import textwrap
import types
import typing
from collections.abc import Awaitable, Callable, Collection, Mapping
from inspect import signature
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from ssm_metarl.checks import brief

Scope = Mapping[str, Any]
Channel = Callable[..., Awaitable[Any]]

REFUSED = b"This page is not served under the name that was asked for: open it by its address, or see app --names.\n"


class HostCheck:
    """Refuses requests that ask for another host than this machine.

    A page from elsewhere can let a name of its own lead to this address (DNS rebinding); the browser then takes both
    for one site, and the name is all that tells them apart. An address is never such a name. The origin of a request
    that changes something must be this machine, too.

    Args:
        app: what answers the other requests.
        host: that the page listens on.
        names: other names of this machine, such as that of a proxy.
    """

    def __init__(self, app: Any, host: str, names: Collection[str] = ()) -> None:
        self._app, self._local = app, is_loopback(host)
        own = {"localhost", host.lower()} | (set() if self._local else {socket.gethostname(), socket.getfqdn()})
        self._names = {name.lower().rstrip(".") for name in (*own, *names)}

    async def __call__(  # noqa: D102 (of ASGI)
        self, scope: Scope, receive: Channel, send: Channel
    ) -> None:
        if scope["type"] not in ("http", "websocket") or self._welcome(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(REFUSED))]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSED})

    def _welcome(self, scope: Scope) -> bool:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not self._is_ours("//" + hosts[0].decode("latin-1")):
            return False
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        looks = scope.get("method") in ("GET", "HEAD")
        return looks or all(self._is_ours(origin) for origin in origins)

    def _is_ours(self, url: str) -> bool:
        """Whether the host in a URL is this machine."""
        try:
            name = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._local


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guard_inputs(page: gr.Blocks) -> None:
    """Let the page refuse in one sentence what its boxes cannot hold; Gradio's own checks end with a traceback."""
    original = page.preprocess_data

    async def preprocess_data(*args: Any, **kwargs: Any) -> list[Any]:
        try:
            return await original(*args, **kwargs)
        except Exception as error:
            reason = error.message if isinstance(error, gr.Error) else "The page was sent what none of its boxes holds."
            sentence = html.escape(textwrap.shorten(str(reason), 300))
            raise gr.Error(sentence, duration=None, print_exception=False) from None

    page.preprocess_data = preprocess_data  # type: ignore[method-assign]


def check_types(handler: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Refuse arguments of other types than a handler's own.

    Raises:
        ValueError: one sentence that names the argument.
    """
    hints = typing.get_type_hints(handler)
    bound = signature(handler).bind_partial(*given)
    for name, value in bound.arguments.items():
        many = signature(handler).parameters[name].kind.name == "VAR_POSITIONAL"
        for each in value if many else (value,):
            if not _fits(each, hints.get(name, Any)):
                raise ValueError(f"{name.replace('_', ' ')} cannot be {brief(each)}.")


def is_number(value: Any) -> bool:
    """Whether a value from a browser is a finite number that a float holds."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return number and math.isfinite(value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a browser is of a type; a whole number may be written with a point."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return is_number(value) and (hint is float or float(value).is_integer())
    return isinstance(value, hint) if hint in (str, bool) else True
