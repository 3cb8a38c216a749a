"""Counter-based noise: a pure function of (stream, position, token), so that a token never depends on its neighbours.

A stream is a hash of a seed and a path (choice index, or the path to a node of a tree). Any process that knows the
stream and the tokens so far continues an answer in exactly the same way.

Shapes: B rows, K candidates.

By hand, since the numbers of torch's generators depend on the order of the draws.
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def stream(seed: int, *path: int | str) -> int:
    """A 64-bit stream number (signed, as torch holds it) for a seed and any path below it."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(stream_: int, position: int) -> float:
    """One number in (0, 1) for choices that are not tokens, such as segment lengths."""
    tokens = torch.full((1, 1), -1, dtype=torch.int64)
    return float(_uniform(torch.tensor([stream_]), torch.tensor([position]), tokens))


def gumbel(streams_B: torch.Tensor, positions_B: torch.Tensor, tokens_BK: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise G = -log(-log u), float64 [B, K]; all arguments int64.

    The position is the index in the answer, excluding the prompt.
    """
    return _uniform(streams_B, positions_B, tokens_BK).log_().neg_().log_().neg_()


def _uniform(streams_B: torch.Tensor, positions_B: torch.Tensor, tokens_BK: torch.Tensor) -> torch.Tensor:
    per_row_B = _mix(streams_B + positions_B * _signed(_GOLDEN)) + _signed(_GOLDEN)
    hash_BK = _mix(per_row_B[:, None] + tokens_BK * _signed(_GOLDEN))
    return _shift_right(hash_BK, 32).to(torch.float64).add_(0.5).div_(2**32)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), in wrapping int64 arithmetic."""
    x = (x ^ _shift_right(x, 30)).mul_(_signed(_MIX_1))
    x = (x ^ _shift_right(x, 27)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's shift is arithmetic."""
    return (x >> bits).bitwise_and_(_MASK >> bits)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
