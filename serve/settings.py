"""Typed arguments of the Serve applications, as serve/config.yaml gives them. Knows nothing of Ray or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mavis_dist.config import Config
from mavis_dist.sections import MAX_N, MAX_PREFERENCES, Base, Replicas, Serve, Steer, bounds

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
NO_KEYS = "none"
BASE, SERVE, STEER = Base(), Serve(), Steer()


class Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    storage: str = Field(
        str(ROOT / "runs"), description="folder or fsspec URI of all runs; a relative one is below this checkout"
    )
    run: str = Field(description="name of the run whose published value models are served")
    dtype: Literal["float32", "bfloat16"] = BASE.dtype
    device: str = BASE.device
    cpus: Annotated[float, Field(ge=0)] = SERVE.cpus_per_replica
    gpus: Annotated[float, Field(ge=0)] = SERVE.gpus_per_replica
    replicas: Replicas = Field(
        1, description="a number, or {min: 1, max: 4}: as many as bring the load of each to `target_load`"
    )
    target_load: Annotated[float, Field(gt=0)] = Field(
        0.8,
        description="of a base replica: rows in use and waited for, as a share of `rows`; of a value replica: calls "
        "under way, on average",
    )
    upscale_delay_s: Annotated[float, Field(ge=0)] = Field(10, description="how long load stays high before more begin")
    downscale_delay_s: Annotated[float, Field(ge=0)] = Field(300, description="how long it stays low before one ends")

    @field_validator("storage")
    @classmethod
    def _found_from_anywhere(cls, storage: str) -> str:
        # Replicas run in working directories of their own.
        return storage if "://" in storage else str(ROOT / Path(storage).expanduser())


class MainArgs(Arguments):
    """Gateway and base. Objectives are not named: they come from the store."""

    base: str = Field(BASE.model, description="name of the base model, as in the config key base.model")
    system: str = BASE.system
    placement: Literal["colocated", "replicas"] = SERVE.placement
    value_sessions: Annotated[int, Field(ge=1)] = Field(
        1, description="shares of a base replica's rows; most value replicas per base replica, rounded up"
    )
    rows: Annotated[int, Field(ge=1)] = SERVE.rows
    cache_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="room for keys and values of a base replica: rows times longest row; none: what `rows` need"
    )
    queue: Annotated[int, Field(ge=1)] | None = Field(
        None, description="rows that may wait in a base replica, those of one key at most half; none: 4 times `rows`"
    )
    max_tokens: Annotated[int, Field(ge=1)] = SERVE.max_tokens
    stream_interval_ms: Annotated[int, Field(ge=0, le=10_000)] = Field(
        50, description="least time between two pieces of an answer, but for the first and last"
    )
    beta: Annotated[float, Field(ge=0)] = STEER.beta
    tilt_cap: Annotated[float, Field(gt=0)] | None = STEER.tilt_cap
    stall_s: Annotated[float, Field(gt=0)] = Field(60, description="silence after which a base replica counts as lost")
    deadline_s: Annotated[float, Field(gt=0)] = Field(600, description="longest time one request may take")
    keys: Annotated[str, Field(min_length=1)] = Field(
        str(ROOT / "keys.json"),
        description="file of API keys (python -m jobs.keys), on the gateway's machine; a relative one is below this "
        "checkout; none: whoever reaches the port may ask",
    )
    cors_origins: tuple[str, ...] = Field((), description="origins whose pages may call the service from a browser")
    max_body_bytes: Annotated[int, Field(ge=1)] = Field(2**19, description="largest body of a request")
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest prompt; none: what the base model's context has room for"
    )
    max_n: Annotated[int, Field(ge=1, le=MAX_N)] = Field(16, description="most answers to one request")
    max_preferences: Annotated[int, Field(ge=0, le=MAX_PREFERENCES)] = Field(
        16, description="most sentences in one request"
    )
    log_access: bool = Field(True, description="a JSON line per request on standard output")
    log_prompts: bool = Field(False, description="with the body of the request, prompt included, in the line")

    @field_validator("keys")
    @classmethod
    def _below_the_checkout(cls, keys: str) -> str:
        return keys if keys == NO_KEYS else str(ROOT / Path(keys).expanduser())


class ValueArgs(Arguments):
    """The value model of one objective."""

    objective: str


def main_args(config: Config, keys: str | None = None) -> MainArgs:
    """`keys` as in MainArgs. None: no keys where only this machine can ask, else the default file."""
    serve = config.serve
    if keys is None and serve.host in LOOPBACK:
        keys = NO_KEYS
    return MainArgs(
        **_common(config),
        **({} if keys is None else {"keys": keys}),
        replicas=serve.base_replicas,
        base=config.base.model,
        system=config.base.system,
        placement=serve.placement,
        value_sessions=-(-bounds(serve.value_replicas).max // bounds(serve.base_replicas).min),
        rows=serve.rows,
        max_tokens=serve.max_tokens,
        beta=config.steer.beta,
        tilt_cap=config.steer.tilt_cap,
    )


def value_args(config: Config, objective: str) -> ValueArgs:
    return ValueArgs(**_common(config), replicas=config.serve.value_replicas, objective=objective)


def _common(config: Config) -> dict[str, Any]:
    storage = config.storage if "://" in config.storage else str(Path(config.storage).expanduser().absolute())
    return {
        "storage": storage,
        "run": config.run,
        "dtype": config.base.dtype,
        "device": config.base.device,
        "cpus": config.serve.cpus_per_replica,
        "gpus": config.serve.gpus_per_replica,
    }
