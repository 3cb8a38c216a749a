"""Middleware of every request: its id, its API key, the limit on its body, its line in the log.

Knows nothing of Ray.

Routes find in `request.state`: `request_id`; `key`, the name of the caller's key (none where no key is required); and
`facts`, a function that returns further fields of the log line, which they may replace.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mavis_dist.sections import Access
from serve.gateway.api_keys import Keys
from serve.gateway.protocol import ApiError

logger = logging.getLogger(__name__)
access = logging.getLogger("serve.access")

# All other paths require a key: the page and the description are the same for all, and probes have none.
OPEN_PATHS = {"/", "/health", "/openapi.json"}
SANE_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ID_HEADER = "x-request-id"


class Middleware:
    def __init__(self, app: ASGIApp, settings: Access, keys: Keys | None, returns_id: bool):
        """
        Args:
            keys: the keys that are accepted; none: no key is required.
            returns_id: whether responses carry the request's id; not where a proxy adds it.
        """
        self._app, self._settings, self._keys, self._returns_id = app, settings, keys, returns_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked, scope = scope, _plain(scope)
        headers, started, status = Headers(scope=scope), time.monotonic(), None
        given = headers.get(ID_HEADER, "")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope["state"] = {**scope.get("state", {}), "request_id": request_id, "key": None, "facts": dict}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._returns_id:
                    MutableHeaders(scope=message)[ID_HEADER] = request_id
            elif asked["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            state["key"] = self._owner(scope["path"], headers)
            await self._app(scope, self._limited(receive), answer)
        except ApiError as error:
            refused = JSONResponse(error.body, error.status, {"WWW-Authenticate": "Bearer"})
            await refused(scope, receive, answer)
        except Exception as error:
            logger.exception("%s %s failed", scope["method"], scope["path"], extra={"facts": {ID_HEADER: request_id}})
            if status is not None:
                raise  # the server closes the connection: the client must see that the answer is incomplete
            failed = ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")
            await JSONResponse(failed.body, failed.status)(scope, receive, answer)
        finally:
            if "route" in scope:
                asked["route"] = scope["route"]
            if self._settings.log_access:
                self._log({**scope, "method": asked["method"]}, status, time.monotonic() - started)

    def _owner(self, path: str, headers: Headers) -> str | None:
        """The name of the caller's key; raises ApiError."""
        if self._keys is None or path in OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise ApiError(
                401,
                "no valid API key; send one of this server's as `Authorization: Bearer KEY`",
                None,
                "invalid_api_key",
            )
        return owner

    def _limited(self, receive: Receive) -> Receive:
        """The same messages; raises HTTPException once the body is too large."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._settings.max_body_bytes:
                limit = self._settings.max_body_bytes
                raise HTTPException(413, f"the body is larger than {limit} bytes; send a shorter one")
            return message

        return counted

    def _log(self, scope: Scope, status: int | None, duration_s: float) -> None:
        """Write one line; without a status the client left before the response."""
        method, path, state = scope["method"], scope["path"][:200], scope["state"]
        facts = {
            "request_id": state["request_id"],
            "key": state["key"],
            "method": method,
            "path": path,
            "status": status,
            "duration_ms": round(1000 * duration_s, 1),
            **state["facts"](),
        }
        access.info("%s %s %s", method, path, status, extra={"facts": facts})


def _plain(scope: Scope) -> Scope:
    """The same request without a slash at the end of its path, and HEAD as GET, whose body is not sent."""
    path = scope["path"].rstrip("/") or "/"
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
