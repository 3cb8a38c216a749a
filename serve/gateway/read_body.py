"""From the bytes of a body to JSON, or to an error that says what is wrong with them. Knows nothing of models."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from serve.gateway.protocol import ApiError, Json

MAX_DIGITS = 4300  # of an integer; Python reads no longer ones
ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate as JSON spells it
SURROGATE = re.compile("[\ud800-\udfff]")


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_first(request: Request) -> Response:
            try:
                raw = await request.body()
            except ClientDisconnect:
                raise ApiError(499, "the client closed the connection", code="client_closed_request") from None
            return await handle(_ReadRequest(request, read_json(request.headers, raw)))

        return read_first


class _ReadRequest(Request):
    """A request whose body was read."""

    def __init__(self, request: Request, body: Json):
        super().__init__(request.scope, request.receive)
        self._body, self._read = b"{}", body  # FastAPI only asks whether there are bytes

    async def json(self) -> Json:
        return self._read


def read_json(headers: Headers, raw: bytes) -> Json:
    """The object in a body; raises ApiError for anything that is not one, is ambiguous, or is no valid Unicode."""
    _check_headers(headers)
    if raw.startswith(b"\x1f\x8b"):
        raise _invalid("is compressed (gzip); send it uncompressed")
    if not raw.strip():
        raise _invalid("is empty; send a JSON object")
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError as error:
        raise _invalid(f"is not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}); encode it as UTF-8") from None
    try:
        body = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise _invalid(f"is not valid JSON: {error.msg} at character {error.pos}; correct it") from None
    except RecursionError:
        raise _invalid("is nested too deeply; send the fields of this API") from None
    if not isinstance(body, dict):
        raise _invalid(f"is a JSON {type(body).__name__}; send an object")
    if ESCAPED.search(text):
        _check_texts(body)
    return body


def _invalid(problem: str) -> ApiError:
    return ApiError(400, f"the body {problem}", code="invalid_json")


def _check_headers(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise _invalid(f"is compressed (content-encoding: {encoding}); send it uncompressed")
    given = headers.get("content-type", "")
    kind = Message()
    kind["content-type"] = given
    subtype = kind.get_content_subtype()
    if kind.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        named = f"has the content type {given!r:.100}" if given else "has no content type"
        raise _invalid(f"{named}; send the header content-type: application/json")
    charset = str(kind.get_param("charset", "utf-8"))
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise _invalid(f"has the charset {charset!r:.100}; encode it as UTF-8")


def _object(pairs: list[tuple[str, Any]]) -> Json:
    body = dict(pairs)
    if len(body) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ApiError(400, f"the field {twice!r} is given twice in one object; give it once", twice, "invalid_json")
    return body


def _constant(name: str) -> float:
    raise _invalid(f"holds {name}, which is not JSON; use a finite number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _invalid(f"holds a number of {len(digits)} digits; use a smaller one")
    return int(digits)


def _check_texts(body: Json) -> None:
    """Refuse halves of surrogate pairs, which JSON can express and UTF-8 cannot, in any text at any depth."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), body)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and (found := SURROGATE.search(value)):
            param = ".".join(path) or None
            half = f"half of a character (\\u{ord(found[0]):04x})"
            raise ApiError(400, f"{param or 'a field'}: holds {half}; send whole characters", param)
        if isinstance(value, dict):
            waiting += [(path, name) for name in value]
            waiting += [((*path, name), one) for name, one in value.items()]
        elif isinstance(value, list):
            waiting += [((*path, str(number)), one) for number, one in enumerate(value)]
