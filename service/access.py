"""Who may ask what: the door that every request passes before anything of it but its head is read.

    /livez, /readyz                     open
    /metrics, /info, /docs and the like any key
    GET                                 read       POST /recommend..., /api/recommend/   read
    POST /events, PUT, DELETE /items    write      everything else                       admin

A browser cannot send a key by itself, but it asks its reader for a name and a password: on the pages of the docs, and
nowhere else, the key may come as that password.

Without keys, only this machine is answered: a peer on the loopback interface, with no proxy between, that asked for a
host which no public name server could have led it to (a web page must not reach a service on its reader's machine).
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from service import errors
from service.errors import Forbidden, RateLimited, ServiceError, Unauthorized, problem
from service.keys import Key, KeyRing, Scope
from service.rates import RateLimit
from service.routes.pages import ASSETS
from service.telemetry import Trace

OPEN: Final = frozenset({"/livez", "/readyz"})
PAGES: Final = frozenset({"docs", "redoc", "openapi.json", ASSETS})
"""First parts of paths that people read in a browser."""
ANY_KEY: Final = PAGES | {"metrics", "info"}
"""First parts of paths that tell of the service, and of no user."""
LOCAL: Final = Key("local", frozenset(Scope), b"")
"""Who asks, where there are no keys."""
SCHEME: Final = "key"
ASKING: Final = {"WWW-Authenticate": 'Basic realm="Upnext: any name, and a key as the password"'}
"""Has a browser ask. Chromium, for one, does not when the same line names a second scheme."""
_FORWARDED: Final = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})


def needed(method: str, path: str) -> Scope | None:
    """The scope that a request needs; None where any key will do. What is not known here needs `admin`."""
    if method in _READING and _first(path) in ANY_KEY:
        return None
    if method in _READING or (method == "POST" and path.startswith(("/recommend", "/api/recommend/"))):
        return Scope.READ
    if (method == "POST" and path == "/events") or (method in ("PUT", "DELETE") and path.startswith("/items/")):
        return Scope.WRITE
    return Scope.ADMIN


def _first(path: str) -> str:
    return path[1:].partition("/")[0]


class Door:
    """ASGI middleware that lets in who may come in, and not too often. It waits for the count of a limit alone."""

    def __init__(self, app: ASGIApp, keys: KeyRing, limit: RateLimit | None) -> None:
        self.app, self.keys, self.limit = app, keys, limit

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        try:
            key = self._key(scope)
            trace: Trace = scope["upnext.trace"]
            trace.caller = key.name
            required = needed(scope["method"], scope["path"])
            if required is not None and required not in key.scopes:
                raise Forbidden(f"This needs a key with the scope `{required}`; the key {key.name!r} has not.")
            if self.limit is not None:
                await self.limit.admit(key.name)
        except ServiceError as error:
            asking = isinstance(error, Unauthorized) and self.keys.required and _first(scope["path"]) in PAGES
            await problem(error, scope["path"], ASKING if asking else None)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _key(self, scope: AsgiScope) -> Key:
        """The key of who asks. Raises Unauthorized."""
        if not self.keys.required:
            _refuse_strangers(scope)
            return LOCAL
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = given.decode("latin-1").partition(" ")
        key = None
        if kind.lower() == "bearer":
            key = self.keys.find(token.strip())
        elif kind.lower() == "basic" and _first(scope["path"]) in PAGES:
            key = self.keys.find(password_of(token))
        if key is None:
            raise Unauthorized()
        return key


def password_of(credentials: str) -> str:
    """The password in credentials of the scheme Basic (RFC 7617); "" where there is none."""
    try:
        return b64decode(credentials).decode("utf-8", "replace").partition(":")[2]
    except ValueError:
        return ""


def _refuse_strangers(scope: AsgiScope) -> None:
    host = b""
    for name, value in scope["headers"]:
        if name == b"host":
            host = value
        elif name in _FORWARDED:
            raise Unauthorized(NO_KEYS)
    client = scope["client"]
    if client is None or not is_loopback(client[0]) or not is_local_name(host.decode("latin-1")):
        raise Unauthorized(NO_KEYS)


NO_KEYS: Final = (
    "This service has no API keys, so it answers this machine alone. Make a key with `python -m service key`, put its "
    "line into the file that UPNEXT_API_KEYS_FILE names (or set UPNEXT_API_KEY), restart, and send "
    "`Authorization: Bearer <key>`."
)


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


@lru_cache(maxsize=1024)
def is_local_name(host: str) -> bool:
    """Whether a Host header names no machine of the internet: a loopback address, or a name without a dot."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name) or not ("." in name or ":" in name)


def describe(document: dict[str, Any]) -> None:
    """Put keys, scopes and the errors of the door into an OpenAPI document."""
    document["components"]["securitySchemes"] = {
        SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key, made by `python -m service key`. A service without keys answers callers on "
            "its own machine without one.",
        }
    }
    for method, path, operation in operations(document):
        if path in OPEN:
            operation["security"] = []
            continue
        scope = needed(method.upper(), path)
        operation["security"] = [{SCHEME: [] if scope is None else [str(scope)]}]
        refused = errors.responses(Unauthorized, *([] if scope is None else [Forbidden]), RateLimited)
        for status, response in refused.items():
            operation["responses"].setdefault(str(status), response)
        if scope is not None:
            operation["responses"]["403"]["description"] = f"The key has not the scope `{scope}`"


def operations(document: dict[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every operation in an OpenAPI document."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation
