"""Tokens per second of this engine and of its peers, measured in alternation. Times include the prompts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import contender
from benchmarks.common.contender import Contender
from benchmarks.common.interleave import in_turn
from benchmarks.common.interleave import ratio as median_ratio
from benchmarks.decode.contender import programs as all_programs
from mavis_dist.decode import SamplingParams

WARMUP_TOKENS = 3
SAME_WEIGHTS = ("vllm", "vllm_all_cores", "llamacpp_bf16")  # the peers with this engine's weights
REFERENCE_SIZE = 1  # it answers one request after the other, whatever their number

Speeds = dict[str, dict[int, list[float]]]  # variant -> concurrent requests -> tokens/s of every repetition


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    prompts: list[tuple[int, ...]]
    sizes: tuple[int, ...]  # concurrent requests
    lengths: tuple[int, ...]  # tokens per answer
    repetitions: int


def measure(
    run: Path, base: str, work: Work, threads: int, pythons: Mapping[str, Path]
) -> tuple[dict[int, Speeds], list[str]]:
    """Speeds by length of the answers, and the versions of the engines."""
    longest = max(map(len, work.prompts[: max(work.sizes)])) + max(work.lengths)
    options = {"threads": threads, "top_k": SamplingParams().top_k, "max_rows": max(work.sizes), "max_length": longest}
    with TemporaryDirectory(prefix="mavis-") as folder:
        programs = all_programs(run, base, options, pythons, Path(folder))
        with contender.start(programs) as contenders:
            return take_turns(contenders, work), list(dict.fromkeys(found.version for found in contenders))


def take_turns(contenders: Sequence[Contender], work: Work) -> dict[int, Speeds]:
    programs = {variant: found for found in contenders for variant in found.variants}
    tasks = [
        (size, variant)
        for size in work.sizes
        for variant in programs
        if variant != "reference" or size == REFERENCE_SIZE
    ]
    for size, variant in tasks:
        programs[variant].tokens_per_s(variant, work.prompts[:size], WARMUP_TOKENS, 0)
    turns = [(length, *task) for length in work.lengths for task in tasks]
    speeds: dict[int, Speeds] = {length: {variant: {} for variant in programs} for length in work.lengths}
    for repetition, (length, size, variant) in in_turn(turns, work.repetitions):
        speed = programs[variant].tokens_per_s(variant, work.prompts[:size], length, repetition)
        speeds[length][variant].setdefault(size, []).append(speed)
    return speeds


def median(speeds: Speeds, name: str, size: int) -> float:
    return statistics.median(speeds[name][size])


def ratio(speeds: Speeds, name: str, other: str, size: int, other_size: int | None = None) -> float:
    """Speed of one variant over that of the other: the median of the ratios within a repetition."""
    return median_ratio(speeds[name][size], speeds[other][other_size or size])


def headlines(speeds: Mapping[int, Speeds], sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """Ratios of speeds, by length of the answers."""
    ratios = {str(length): _ratios(found, sizes) for length, found in speeds.items()}
    names = next(iter(ratios.values()))
    return {name: {length: found[name] for length, found in ratios.items()} for name in names}


def _ratios(speeds: Speeds, sizes: Sequence[int]) -> dict[str, float]:
    pairs = {f"engine_vs_hf_b{size}": ("unguided", "hf", size) for size in sizes}
    pairs |= {f"engine_vs_best_peer_b{size}": ("unguided", peer, size) for size, peer in _best_peers(speeds, sizes)}
    for size in (1, 16):
        pairs |= {f"lazy_vs_unguided_b{size}": ("lazy_2", "unguided", size)}
        for scorer in ("predicted", "qhead"):
            variants = [name for name in speeds if name.startswith(scorer)]
            pairs |= {f"{scorer}_vs_unguided_b{size}": (name, "unguided", size) for name in variants}
    pairs |= {
        "lazy_heads_vs_unguided_b16": ("lazy_2_heads", "unguided", 16),
        "full_vs_unguided_b16": ("full_2", "unguided", 16),
    }
    return {
        **{name: ratio(speeds, *pair) for name, pair in pairs.items()},
        "guided_vs_reference_16": ratio(speeds, "lazy_2", "reference", 16, REFERENCE_SIZE),
        "full_vs_reference_16": ratio(speeds, "full_2", "reference", 16, REFERENCE_SIZE),
    }


def _best_peers(speeds: Speeds, sizes: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Every size with the peer that is fastest there with this engine's weights."""
    peers = [name for name in SAME_WEIGHTS if name in speeds]
    for size in sizes if peers else ():
        yield size, max(peers, key=lambda name: median(speeds, name, size))
