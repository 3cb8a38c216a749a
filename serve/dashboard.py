"""The replicas of the applications, as Ray's dashboard shows and changes them. Needs no connection to the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

from mavis_dist.environment import DASHBOARD
from mavis_dist.types import UserError, one_line
from serve.settings import MAIN, value_application

ANSWER_S = 30.0


class ScaleError(UserError):
    """Replicas that cannot be shown or changed."""


@dataclass(frozen=True)
class Scaled:
    """A deployment that is scaled by its own name: `base`, or an objective."""

    name: str
    running: int
    target: int
    status: str  # of the deployment, as Serve names it
    message: str  # why it is not healthy, or empty


class Dashboard:
    """Ray's dashboard at an address, such as http://127.0.0.1:8265."""

    def __init__(self, address: str):
        try:
            headers = get_auth_headers_if_auth_enabled({})
            self._http = httpx.Client(base_url=address, headers=headers, timeout=ANSWER_S, trust_env=False)
        except (httpx.InvalidURL, RuntimeError, ValueError) as error:
            raise ScaleError(
                f"--dashboard {address} cannot be used ({one_line(error)}): give a URL, {DASHBOARD}"
            ) from None
        self._address = address

    def replicas(self) -> dict[str, Scaled]:
        """By name, base first; raises ScaleError."""
        applications = self._ask("GET", "/api/serve/applications/").json()["applications"]
        found = {}
        for name in sorted(applications, key=lambda name: (name != MAIN, name)):
            for deployment, details in (applications[name].get("deployments") or {}).items():
                if (own := _own_name(name, deployment)) is not None:
                    found[own] = _scaled(own, details)
        return found

    def scale(self, name: str, count: int) -> None:
        """Ask for so many replicas, which come later; raises ScaleError."""
        application, deployment = (MAIN, "Base") if name == "base" else (value_application(name), "Value")
        path = f"/api/v1/applications/{application}/deployments/{deployment}/scale"
        self._ask("POST", path, json={"target_num_replicas": count})

    def _ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **body)
        except httpx.HTTPError as error:
            raise ScaleError(
                f"--dashboard {self._address} does not answer ({one_line(error) or type(error).__name__}): give the "
                "address that `ray start --head` or `ray dashboard` prints"
            ) from None
        if response.status_code in (401, 403):
            raise ScaleError(
                f"--dashboard {self._address} refuses the token ({response.status_code}): set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
            )
        if response.status_code == 412:
            raise ScaleError(
                "the service scales by load, or was started without external_scaler_enabled: give it fixed counts, as "
                "docs/serving.md describes"
            )
        if response.is_error:
            raise ScaleError(f"--dashboard {self._address} answers {response.status_code}: {response.text[:200]}")
        return response


def _own_name(application: str, deployment: str) -> str | None:
    if (application, deployment) == (MAIN, "Base"):
        return "base"
    prefix = value_application("")
    return application.removeprefix(prefix) if deployment == "Value" and application.startswith(prefix) else None


def _scaled(name: str, details: Mapping[str, Any]) -> Scaled:
    running = sum(replica["state"] == "RUNNING" for replica in details["replicas"])
    return Scaled(name, running, details["target_num_replicas"], details["status"], details.get("message") or "")
