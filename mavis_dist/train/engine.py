"""The DeepSpeed engine. No other module imports DeepSpeed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mavis_dist.native import build
from mavis_dist.sections import Train

SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"


def make_engine(model: nn.Module, settings: Train, num_steps: int, trees_per_pass: int) -> Any:
    """A DeepSpeed engine around `model`, with AdamW, linear warm-up and linear decay.

    Needs an initialised process group (Ray Train makes one).
    """
    _prepare_compiler()
    import deepspeed

    if not build.has_compiler():  # gloo reduces instead of DeepSpeed's operator
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OPERATOR] = False

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
    )
    warmup = max(1, int(settings.warmup * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (num_steps - step) / max(1, num_steps - warmup)))
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        model_parameters=trained,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": trees_per_pass,
            "gradient_accumulation_steps": settings.accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": _zero(settings),
            # ZeRO shards the states of any torch optimizer, but DeepSpeed asks for consent.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": settings.dtype == "bfloat16", "dtype": "bfloat16"},
            "steps_per_print": 1_000_000_000,
            "wall_clock_breakdown": False,
        },
    )
    _unlink_shared_memory()
    return engine


def _zero(settings: Train) -> dict[str, Any]:
    offload = {"offload_optimizer": {"device": "cpu"}} if settings.offload else {}
    return {"stage": settings.zero_stage, **offload}


def _prepare_compiler() -> None:
    """Let DeepSpeed compile its operators with this environment's ninja into this environment's own cache: environments
    that share a cache recompile each other's operators.
    """
    build.use_own_ninja()
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def _unlink_shared_memory() -> None:
    """Unlink DeepSpeed's shared-memory buffers, 64 MiB each, once all workers have opened them: they are freed with the
    last process. DeepSpeed itself would leave them in memory until the machine restarts.
    """
    torch.distributed.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{torch.distributed.get_rank()}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def trained_state(engine: Any) -> dict[str, torch.Tensor]:
    """All trained parameters in float32 on the CPU, gathered from the workers. Call it on all workers."""
    from deepspeed.utils import safe_get_full_fp32_param

    def full(parameter: nn.Parameter) -> torch.Tensor:
        gathered = safe_get_full_fp32_param(parameter)
        return parameter if gathered is None else gathered  # ZeRO 0 does not shard parameters

    named = engine.module.named_parameters()
    return {name: full(p).detach().float().cpu().clone() for name, p in named if p.requires_grad}


def warm_up() -> None:
    """Compile DeepSpeed's operators once, so that no training waits for them."""
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    make_engine(nn.Linear(2, 2), Train(), num_steps=1, trees_per_pass=1)
    torch.distributed.destroy_process_group()
