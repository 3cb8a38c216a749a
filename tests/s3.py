"""An S3 server on loopback that fails on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

Answer = Callable[[dict[str, Any], Callable[..., Any]], Any]  # a WSGI application
KEY = "right-key"
RETRIES = 5  # of s3fs, of a request that S3 refuses for its rate, or whose response breaks off


class S3Server:
    """One bucket, which only requests with the right key may use."""

    bucket = "bucket"

    def __init__(self) -> None:
        reason = "the S3 server of the tests is not installed: pip install 'mavis-dist[dev]'"
        pytest.importorskip("s3fs", reason=reason)
        pytest.importorskip("flask_cors", reason=reason)
        app = pytest.importorskip("moto.moto_server.werkzeug_app", reason=reason)
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log_request(self, code: object = "-", size: object = "-") -> None:
                pass

        self._s3: Answer = app.DomainDispatcherApplication(app.create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.fault: Callable[[dict[str, Any]], Answer | None] = lambda _: None  # what answers instead of S3
        self.num_requests = 0
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # of botocore, within each attempt of s3fs
        }

    def _answer(self, request: dict[str, Any], start: Callable[..., Any]) -> Any:
        self.num_requests += 1
        answer = self.fault(request)
        if answer is None and f"Credential={KEY}/" not in request.get("HTTP_AUTHORIZATION", ""):
            answer = refusal(403, "InvalidAccessKeyId", "The access key does not exist.")
        return (answer or self._s3)(request, start)

    def broken_off(self, request: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        """The answer of S3, whose connection ends in the middle."""
        head: list[Any] = []
        body = b"".join(self._s3(request, lambda *arguments: head.extend(arguments)))
        start(*head)
        return [body[: len(body) // 2]]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def refusal(status: int, code: str, message: str) -> Answer:
    from werkzeug.wrappers import Response

    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Response(text, status=status, mimetype="application/xml")


def forget_connections() -> None:
    """Use the environment as it is now, as a new process would."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server whose bucket exists, and the environment that names it."""
    server = S3Server()
    from s3fs import S3FileSystem

    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        forget_connections()
        S3FileSystem().makedirs(server.bucket, exist_ok=True)
        yield server
        forget_connections()
    server.stop()
