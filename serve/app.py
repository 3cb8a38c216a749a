"""The Serve applications, and their deployment on the connected cluster.

`main` is gateway and base; `value-<objective>` is one objective's value model, in an application of its own so that
objectives come, go and scale without touching the others.
"""

# No postponed annotations here: Serve reads the builders' argument types as classes.
import time
from collections.abc import Callable
from typing import Any

import httpx
from ray import serve
from ray.serve import Application

from mavis_dist import cluster
from mavis_dist.config import Config
from mavis_dist.plan import check_serving
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.types import UserError
from serve.base import Base
from serve.gateway import Gateway, open_keys
from serve.handles import value_application
from serve.settings import Arguments, MainArgs, ValueArgs, main_args, value_args
from serve.value import Value

MAIN = "main"
DRAIN_MARGIN_S = 30
BASE_ROUTER = "serve.routing.AnotherReplicaRouter"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class DeployError(UserError):
    """Applications that cannot run; the message says why and what to do."""


def build_main(args: MainArgs) -> Application:
    router = {"request_router_class": BASE_ROUTER}
    base = _deployment(Base, **_options(args), request_router_config=router).bind(args)
    gateway = _deployment(
        serve.ingress()(Gateway),
        max_ongoing_requests=10_000,
        autoscaling_config=_fixed(1),
        ray_actor_options={"num_cpus": args.cpus},
        # Streams under way end by themselves when the gateway is replaced.
        graceful_shutdown_timeout_s=args.deadline_s + DRAIN_MARGIN_S,
    )
    return gateway.bind(args, base)


def build_value(args: ValueArgs) -> Application:
    router = {"request_router_class": ROUTER}
    return _deployment(Value, **_options(args), request_router_config=router).bind(args)


def deploy(config: Config, limit_s: float = 300.0, keys: str | None = None) -> str:
    """Run all applications of a config on the connected cluster; the URL, once every replica is healthy.

    `keys` as in main_args.

    Raises:
        UserError: if they cannot be placed, fail to start, or take longer than `limit_s`.
    """
    store = Store(config.storage, config.run)
    objectives = list(values.published(store))
    if not objectives:
        raise DeployError(f"nothing is published in {store.root}: run the pipeline first, or choose another run=NAME")
    check_serving(config, cluster.nodes())
    args = main_args(config, keys)
    open_keys(args)  # a missing file is said here, in one line
    host, port = config.serve.host, config.serve.port
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    targets = [serve.RunTarget(build_main(args), MAIN, route_prefix="/")]
    if config.serve.placement == "replicas":
        for name in objectives:
            application = build_value(value_args(config, name))
            targets.append(serve.RunTarget(application, value_application(name), route_prefix=None))
    serve.run_many(
        targets,
        wait_for_applications_running=False,
        wait_for_ingress_deployment_creation=False,
    )
    url = f"http://{host}:{port}"
    _wait(lambda: _applications_ready([target.name for target in targets]), limit_s)
    _wait(lambda: _answers(f"{url}/health"), 30)
    return url


def undeploy() -> None:
    """Delete the applications of this project; Serve itself may have others on the connected cluster."""
    for name in serve.status().applications:
        if name == MAIN or name.startswith(value_application("")):
            serve.delete(name)


def _deployment(replica: type, **options: Any) -> serve.Deployment:
    return serve.deployment(**options)(replica)


def _options(args: Arguments) -> dict[str, Any]:
    return {
        # Admission is the engine's business, not the router's.
        "max_ongoing_requests": 10_000,
        "autoscaling_config": _fixed(args.replicas),
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus},
    }


def _fixed(replicas: int) -> dict[str, int]:
    # Going from a fixed number to autoscaling later would restart the deployment.
    return {"min_replicas": replicas, "max_replicas": replicas}


def _applications_ready(names: list[str]) -> str | None:
    """None when all run; else what they wait for. Raises DeployError when one has failed."""
    applications = serve.status().applications
    waiting = []
    for name in names:
        if name not in applications:
            waiting.append(f"{name}: not started")
            continue
        status = applications[name]
        messages = [d.message for d in status.deployments.values() if d.message] or [status.message]
        if status.status == "DEPLOY_FAILED":
            raise DeployError(f"application {name!r} failed to start: {' '.join(messages)}")
        if status.status != "RUNNING":
            waiting.append(f"{name}: {status.status.lower()} {' '.join(messages)}".strip())
    return "; ".join(waiting) or None


def _answers(url: str) -> str | None:
    try:
        response = httpx.get(url, timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        return f"{url} does not answer ({error}); is another program or an older Serve on this port?"
    return None if response.status_code == 200 else f"{url} answers {response.status_code}: {response.text[:200]}"


def _wait(problem: Callable[[], str | None], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while (waiting := problem()) is not None:
        if time.monotonic() > deadline:
            raise DeployError(f"not ready after {limit_s:g} s: {waiting}")
        time.sleep(0.2)
