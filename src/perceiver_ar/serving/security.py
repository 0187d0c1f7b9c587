"""Checks of every request before a handler reads it: the key, the host name, and the limits of its body."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perceiver_ar.serving.errors import FAILED, error_response

RETRY = {"Retry-After": "5"}
"""Header of an answer with status 503, in seconds."""

logger = logging.getLogger(__name__)


class Guard:
    """Middleware. Without a key, only requests to a loopback name pass: a foreign web page could let its own host name
    resolve to this machine (DNS rebinding). Foreign pages may only GET, with a key, too: a
    browser sends their forms with the password that it remembers."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body: int,
        max_bodies: int,
        body_seconds: float,
        answered: Callable[[str, int], None],
    ) -> None:
        """
        max_body, max_bodies: maximum bytes of one body, and of the bodies of all requests that are not yet answered.
        answered: called with the route's template ("other" if no route was found) and the status of each answer.
        """
        self.app, self.max_body, self.max_bodies, self.body_seconds = app, max_body, max_bodies, body_seconds
        self.answered, self.held = answered, 0
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.answered(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        headers = Headers(scope=scope)
        refusal: JSONResponse | None = None
        if self.api_key is None:
            if not is_loopback(host_name(headers.get("host", ""))):
                refusal = error_response(
                    403, "this server answers to localhost only: start it with --api_key to reach it by another name"
                )
        elif scope["path"] != "/health" and not self._has_key(headers.get("authorization", "")):
            refusal = error_response(
                401,
                "the key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="perceiver-ar: any name, the key as password"'},
            )
        if refusal is None and scope["method"] != "GET" and is_foreign(headers):
            refusal = error_response(
                403, f"a page of {headers['origin']} may not use this server; a proxy has to pass the Host header on"
            )
        length = headers.get("content-length", "0")
        if refusal is None and length.isdecimal() and int(length) > self.max_body:
            refusal = error_response(413, self.size())
        if refusal is not None:
            return await refusal(scope, receive, counted)
        body = Body(self, receive)
        try:
            await self.app(scope, body.receive, counted)
        except Exception:
            if started:
                raise
            logger.exception("a request failed")
            await error_response(500, FAILED)(scope, receive, counted)
        finally:
            self.held -= body.received

    def _has_key(self, authorization: str) -> bool:
        """Whether the header has the key: as bearer token, or for browsers as password of basic authentication."""
        assert self.api_key is not None
        scheme, _, value = authorization.partition(" ")
        given = value.strip().encode("latin-1")  # as it came
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self.api_key)

    def size(self) -> str:
        return f"the body has more than {self.max_body} bytes"


class Body:
    """The body of one request, within the limits of the guard."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self.guard, self.source, self.received, self.ended = guard, receive, 0, False
        self.deadline = time.monotonic() + guard.body_seconds

    async def receive(self) -> Message:
        guard = self.guard
        if self.ended:
            return await self.source()
        try:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes with the message.
            async with asyncio.timeout(self.deadline - time.monotonic()):
                message = await self.source()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {guard.body_seconds:g} seconds") from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.received += size
            guard.held += size
            self.ended = not message.get("more_body", False)
            if self.received > guard.max_body:
                raise HTTPException(413, guard.size())
            if guard.held > guard.max_bodies:
                raise HTTPException(503, "the server holds too many large requests: try again later", RETRY)
        return message


def host_name(host: str) -> str:
    """The host in a Host header, without the port and the brackets of IPv6."""
    return host[1 : host.rindex("]")] if host.startswith("[") and "]" in host else host.partition(":")[0].lower()


def is_foreign(headers: Headers) -> bool:
    """Whether a browser sends this for a page from another host. Programs that are no browsers send no Origin."""
    origin = headers.get("origin")
    return origin is not None and host_name(origin.partition("://")[2]) != host_name(headers.get("host", ""))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
