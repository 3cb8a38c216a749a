"""The Serve applications, and their deployment on the connected cluster.

`main` is gateway and base; `value-<objective>` is one objective's value model, in an application of its own so that
objectives are added, removed and scaled without touching the others.
"""

# No postponed annotations here: Serve reads the builders' argument types as classes.
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client, _set_global_client

from mavis_dist import cluster, environment
from mavis_dist.config import Config
from mavis_dist.failures import reason_in, user_error_in
from mavis_dist.groups import STRATEGY, bundles
from mavis_dist.models.decoder import base_decoder
from mavis_dist.models.load import load_skeleton
from mavis_dist.models.lockstep import check_shards
from mavis_dist.plan import check_serving
from mavis_dist.preflight.machine import MACHINE_CHECK_S, check_server
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.tasks import on_every_machine
from mavis_dist.types import UserError
from mavis_dist.vllm.versions import check_installed
from serve.base.replica import Base
from serve.gateway.replica import Gateway, open_keys
from serve.scaling import is_fixed, replica_options
from serve.settings import MAIN, Arguments, MainArgs, ValueArgs, authority, main_args, value_application, value_args
from serve.value.replica import Value

DRAIN_MARGIN_S = 30
STOP_LIMIT_S = 30
HEALTH_EVERY_S = 1.0  # a replica that has died is replaced only once Serve asks; its default is ten seconds
HEAD = "node:__internal_head__"  # Ray's resource of the machine that the proxy runs on
BASE_ROUTER = "serve.router.AnotherReplicaRouter"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
# Where a replica's calls to other deployments run. In its own event loop, a message costs no change of threads; but an
# engine's thread, which waits for value replicas, needs another one.
CALLS_IN_SEPARATE_LOOP = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"


class DeployError(UserError):
    """Applications that cannot run; the message says why and what to do."""


def build_main(args: MainArgs) -> Application:
    router = {"request_router_class": BASE_ROUTER}
    base = _deployment(Base, **_model_options(args), **_group_options(args), request_router_config=router).bind(args)
    gateway = _deployment(
        serve.ingress()(Gateway),
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": args.cpus, **_environment({CALLS_IN_SEPARATE_LOOP: "0"})},
        # Running streams end by themselves when the gateway is replaced.
        graceful_shutdown_timeout_s=args.deadline_s + DRAIN_MARGIN_S,
    )
    return gateway.bind(args, base)


def build_value(args: ValueArgs) -> Application:
    router = {"request_router_class": ROUTER}
    return _deployment(Value, **_model_options(args), request_router_config=router).bind(args)


def deploy(config: Config, limit_s: float = 300.0) -> str:
    """Run all applications of a config on the connected cluster; the URL, once every replica is healthy.

    Raises:
        UserError: if they cannot be placed, fail to start, or take longer than `limit_s`.
    """
    store = Store(config.storage, config.run)
    objectives = list(values.published(store))
    if not objectives:
        raise DeployError(f"nothing is published in {store.root}: run the pipeline first, or choose another run=NAME")
    check_serving(config, cluster.nodes(), len(objectives))
    args = main_args(config)
    open_keys(args)  # reports a missing file here, in one line
    model = load_skeleton(config.base.model).model
    base_decoder(model, use_hf_forward=True)  # and an unusable model
    check_shards(model, config.base.model, config.base.tensor_parallel)
    if config.base.engine == "vllm":
        check_installed()
    there = objectives, environment.versions()
    on_every_machine(check_server, config, *there, stage="check", limit_s=MACHINE_CHECK_S)
    targets = [serve.RunTarget(build_main(args), MAIN, "/", external_scaler_enabled=is_fixed(args))]
    if config.serve.placement == "replicas":
        targets += [_value_target(config, name) for name in objectives]
    url = f"http://{authority(config.serve.host, config.serve.port)}"
    with _nothing_left_behind(_start(config.serve.host, config.serve.port)):
        _run(targets, limit_s)
        _wait(lambda: _answers(f"{url}/health"), 30)
    return url


def deploy_objective(config: Config, objective: str, limit_s: float = 300.0) -> None:
    """Deploy one more objective's value replicas; running applications are not affected.

    With `placement: colocated` there is nothing to deploy: published models are served anyway.

    Raises:
        UserError: if nothing is published for it, its replicas fail to start, or take longer than `limit_s`.
    """
    store = Store(config.storage, config.run)
    if objective not in values.served(store):
        raise DeployError(f"no value model of {objective!r} is published in {store.root}: train it first")
    if config.serve.placement == "replicas":
        with _nothing_left_behind(set(serve.status().applications)):
            _run([_value_target(config, objective)], limit_s)


def undeploy() -> None:
    """Delete the applications of this project, and stop Serve unless the cluster has others."""
    applications = set(serve.status().applications)
    ours = {name for name in applications if name == MAIN or name.startswith(value_application(""))}
    for name in ours:
        serve.delete(name)
    if ours == applications:
        _stop_serve()


def _stop_serve() -> None:
    """Stop Serve. Its own `shutdown` has Ray print that a call of the controller failed, which ends by being killed.

    Raises:
        DeployError: if it takes too long.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        client.shutdown_cached_handles()
        ended = client._controller.graceful_shutdown.options(max_task_retries=0).remote()
        try:
            ray.get(ended, timeout=STOP_LIMIT_S)
        except ray.exceptions.RayActorError:
            pass  # it never returns
        except ray.exceptions.GetTimeoutError as error:
            raise DeployError(
                f"Serve has not stopped within {STOP_LIMIT_S} s: stop it with `serve shutdown`"
            ) from error
        _set_global_client(None)


def _start(host: str, port: int) -> set[str]:
    """Start Serve if it does not run; the names of its applications.

    Raises:
        DeployError: if it cannot listen on this address, or listens on another one, which it cannot change.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    running = None if client is None else client.http_config
    applications = set() if running is None else set(serve.status().applications)
    if running is not None and (running.host, running.port) != (host, port):
        if applications:
            raise DeployError(
                f"this cluster's Serve listens on {authority(running.host, running.port)} and cannot change that while "
                f"it runs: set serve.host={running.host} serve.port={running.port}, or stop its applications "
                f"({', '.join(sorted(applications))}) with `serve shutdown`"
            )
        _stop_serve()
        running = None
    if running is None:
        # Serve itself would not notice another Serve: its proxies share a port, and answer in turn.
        probe = ray.remote(num_cpus=0, resources={HEAD: 0.001})(cluster.bind_problem)
        problem = ray.get(probe.remote(host, port))
        if problem:
            raise DeployError(
                f"nothing can listen on {authority(host, port)} ({problem}): stop the program or the other Serve that "
                f"uses the port, or set another serve.port or serve.host"
            )
        with _nothing_left_behind(applications):
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    return applications


@contextmanager
def _nothing_left_behind(before: set[str]) -> Iterator[None]:
    """Whatever ends this context too early, only the applications from `before` stay, and Serve if there are any."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # whoever called needs the reason, not what came of it
            for name in set(serve.status().applications) - before:
                serve.delete(name)
        if not before:
            with suppress(Exception):
                _stop_serve()
        raise


def _value_target(config: Config, objective: str) -> serve.RunTarget:
    args, name = value_args(config, objective), value_application(objective)
    return serve.RunTarget(build_value(args), name, None, external_scaler_enabled=is_fixed(args))


def _run(targets: list[serve.RunTarget], limit_s: float) -> None:
    serve.run_many(
        targets,
        wait_for_applications_running=False,
        wait_for_ingress_deployment_creation=False,
    )
    _wait(lambda: _applications_ready([target.name for target in targets]), limit_s)


def _deployment(replica: type, **options: Any) -> serve.Deployment:
    return serve.deployment(health_check_period_s=HEALTH_EVERY_S, **options)(replica)


def _model_options(args: Arguments) -> dict[str, Any]:
    return {
        # The engine admits requests, not the router.
        "max_ongoing_requests": 10_000,
        "ray_actor_options": {
            "num_cpus": args.cpus,
            "num_gpus": args.gpus,
            **_environment({CALLS_IN_SEPARATE_LOOP: "1"}),
        },
        **replica_options(args),
    }


def _group_options(args: MainArgs) -> dict[str, Any]:
    """Reserves room for all processes of a base replica."""
    if args.tensor_parallel == 1:
        return {}
    reserved = bundles(args.tensor_parallel, args.cpus, args.gpus)
    return {"placement_group_bundles": reserved, "placement_group_strategy": STRATEGY}


def _environment(variables: dict[str, str]) -> dict[str, Any]:
    return {"runtime_env": {"env_vars": variables}}


def _applications_ready(names: list[str]) -> str | None:
    """None if all run; else what they wait for. Raises DeployError if one has failed."""
    applications = serve.status().applications
    waiting = []
    for name in names:
        if name not in applications:
            waiting.append(f"{name}: not started")
            continue
        status = applications[name]
        messages = [d.message for d in status.deployments.values() if d.message] or [status.message]
        text = "\n".join(messages)
        # Serve would start a replica again that has refused to start.
        if status.status == "DEPLOY_FAILED" or user_error_in(text) is not None:
            raise DeployError(f"application {name!r} failed to start: {reason_in(text)}")
        if status.status != "RUNNING":
            waiting.append(f"{name}: {status.status.lower()} {' '.join(messages)}".strip())
    return "; ".join(waiting) or None


def _answers(url: str) -> str | None:
    try:
        response = httpx.get(url, timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        return f"{url} does not answer ({error}); is it reachable from here?"
    return None if response.status_code == 200 else f"{url} answers {response.status_code}: {response.text[:200]}"


def _wait(problem: Callable[[], str | None], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while (waiting := problem()) is not None:
        cluster.check_stop()
        if time.monotonic() > deadline:
            raise DeployError(f"not ready after {limit_s:g} s: {waiting}")
        time.sleep(0.2)
