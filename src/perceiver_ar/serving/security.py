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

logger = logging.getLogger(__name__)


class Guard:
    """Middleware. Without a key, only requests to a loopback name pass: a foreign web page could let its own host name
    resolve to this machine (DNS rebinding)."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body: int,
        body_seconds: float,
        answered: Callable[[str, int], None],
    ) -> None:
        """answered: called with the route's template ("other" if no route was found) and the status of each answer."""
        self.app, self.max_body, self.body_seconds, self.answered = app, max_body, body_seconds, answered
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
        length = headers.get("content-length", "0")
        if refusal is None and length.isdecimal() and int(length) > self.max_body:
            refusal = self._too_large()
        if refusal is not None:
            return await refusal(scope, receive, counted)
        try:
            await self.app(scope, self._limited(receive), counted)
        except Exception:
            if started:
                raise
            logger.exception("a request failed")
            await error_response(500, FAILED)(scope, receive, counted)

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

    def _limited(self, receive: Receive) -> Receive:
        received, ended = 0, False
        deadline = time.monotonic() + self.body_seconds

        async def limited() -> Message:
            nonlocal received, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.body_seconds:g} seconds") from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if received > self.max_body:
                    raise HTTPException(413, self._size())
            return message

        return limited

    def _size(self) -> str:
        return f"the body has more than {self.max_body} bytes"

    def _too_large(self) -> JSONResponse:
        return error_response(413, self._size())


def host_name(host: str) -> str:
    """The host in a Host header, without the port and the brackets of IPv6."""
    return host[1 : host.rindex("]")] if host.startswith("[") and "]" in host else host.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
