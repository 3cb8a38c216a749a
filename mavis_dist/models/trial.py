"""Whether a model computes in a packed tree, and while decoding, what it computes for every path on its own.

Masks and positions can be given to most decoders, but some do not follow them: they count positions themselves, add
biases by place in the row, or look ahead. Their values would be wrong without a word, so every architecture is tried on
a tree of a few tokens, and on a text in pieces, before it is used.

Shapes: T tokens of a path, S of the tree, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from mavis_dist.models.cache import Layout, Step
from mavis_dist.models.directory import quiet
from mavis_dist.models.hf import HFDecoder
from mavis_dist.models.masks import SIZES, check_masks, refusal, text_config, tree_inputs
from mavis_dist.models.states import keep_layers, view_of
from mavis_dist.types import one_line

WINDOW = 4  # tokens, during the trial: windows and chunks of real models are longer than any tree of a few tokens
SHARED, BRANCH = 7, 8  # tokens of the tree: the common start of its two paths, and the rest of each
TOLERANCE, TOLERANCE_ROUNDED = 1e-3, 0.05  # relative error of states; in less than single precision (right: 0.01)
# Of a model with random weights: its layers, at most; sizes that attention does not depend on; what it may cost.
DEPTH, VOCABULARY, INTERMEDIATE, MOST_PARAMETERS = 4, 128, 16, 160_000_000
INTERMEDIATE_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")  # within names of config keys
SHORTAGES = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)  # of the machine, and not of the model

_TRIED: WeakSet[nn.Module] = WeakSet()


def try_model(backbone: Any) -> None:
    """A few passes of a decoder over some tokens, the first time that it is asked about. In place of a decoder without
    weights, on torch's device `meta`, one with random weights is tried; where that is not possible, only its config.

    Raises:
        ModelError: its values in trees, or while decoding, would be wrong.
    """
    if backbone in _TRIED:
        return
    check_masks(backbone)
    if backbone.device.type == "meta":
        if (random := _with_random_weights(backbone.config)) is not None:
            try_model(random)
        return
    with torch.no_grad(), _short_windows(text_config(backbone)):
        for error_of, place, reason in (
            (tree_error, "a tree of a few tokens", "it does not follow positions and masks that are given to it"),
            (decoding_error, "a text in two pieces", "it does not decode rows of different lengths side by side"),
        ):
            try:
                error = error_of(backbone)
            except SHORTAGES:
                raise
            # Whatever the code of a model raises about arguments that it does not expect.
            except Exception as failure:
                raise refusal(backbone, f"it fails on {place}: {one_line(failure)}") from failure
            if not error < (TOLERANCE if backbone.dtype == torch.float32 else TOLERANCE_ROUNDED):
                raise refusal(backbone, reason)
    _TRIED.add(backbone)


def try_first_layers(config: Any) -> None:
    """The same of the first layers of a decoder, as heads on its states read them; with random weights, where possible.

    Raises:
        ModelError: its other parts, such as embeddings for every layer, need all of them.
    """
    if (random := _with_random_weights(config)) is not None:
        try_model(view_of(random, max(1, random.config.num_hidden_layers - 1)))


def tree_error(backbone: Any) -> float:
    """The relative error of the hidden states of a packed tree against one forward pass per path, of the worse one of
    two branches.
    """
    first, second = SHARED + BRANCH, SHARED + 2 * BRANCH  # ends of the two paths in the tree
    tokens_S = _tokens(backbone, second)
    positions_S = torch.cat([torch.arange(first), torch.arange(SHARED, first)])
    mask_SS = torch.ones(second, second, dtype=torch.bool).tril()
    mask_SS[first:, SHARED:first] = False
    tree_SC = _states(backbone, **tree_inputs(backbone, tokens_S[None], positions_S[None], mask_SS[None]))
    paths = [[*range(first)], [*range(SHARED), *range(first, second)]]
    return max(
        _error(tree_SC[path[SHARED:]], _states(backbone, input_ids=tokens_S[path][None])[SHARED:]) for path in paths
    )


def decoding_error(backbone: Any) -> float:
    """The same of a text in two pieces, by way of the slot cache, against one forward pass; of two rows side by side,
    whose pieces differ.
    """
    length = SHARED + BRANCH
    tokens_T, decoder = _tokens(backbone, length), HFDecoder(backbone, lambda **inputs: backbone(**inputs)[0])
    decoder.cache.resize(2, length)
    first, second = (
        decoder.step(_step(tokens_T, pieces)).split([end - start for start, end in pieces])
        for pieces in ([(0, SHARED), (0, BRANCH)], [(SHARED, length), (BRANCH, length)])
    )
    right_TC = _states(backbone, input_ids=tokens_T[None])
    return max(_error(torch.cat(parts), right_TC) for parts in zip(first, second, strict=True))


def _step(tokens_T: torch.Tensor, pieces: Sequence[tuple[int, int]]) -> Step:
    """Appends to each row one piece of the text, from its start to its end."""
    device, rows, counts = tokens_T.device, [*range(len(pieces))], [end - start for start, end in pieces]
    place_N = torch.cat([torch.arange(*piece, device=device) for piece in pieces])
    layout = Layout(rows, counts, rows, counts, device, num_slots=len(rows))
    read_R, longest = torch.arange(len(place_N), device=device), max(end for _, end in pieces)
    return Step(layout, tokens_T[place_N], place_N, place_N, read_R, num_visible=longest, num_cells=len(tokens_T))


def _tokens(backbone: Any, count: int) -> torch.Tensor:
    return (torch.arange(count, device=backbone.device) * 5 + 5) % min(89, text_config(backbone).vocab_size)


def _error(found_TC: torch.Tensor, right_TC: torch.Tensor) -> float:
    """The largest relative error of a token, and in less than single precision the median, as rounding may send single
    tokens to other experts.
    """
    quantile = 1.0 if found_TC.dtype == torch.float32 else 0.5
    found_TC, right_TC = found_TC.float(), right_TC.float()
    return float(((found_TC - right_TC).norm(dim=-1) / right_TC.norm(dim=-1)).quantile(quantile))


def _with_random_weights(config: Any) -> Any:
    """A decoder with a few of the layers and tokens, or with all layers where it does not work with fewer; None where
    neither does: the largest models, and those with images.
    """
    for small in _smaller(config):
        try:
            with quiet(), torch.no_grad():
                if (random := _random(small)) is not None:
                    _states(random, input_ids=_tokens(random, SHARED)[None])
                    return random
        except SHORTAGES:
            raise
        # An architecture may refuse these sizes, in any way, and be right in its own.
        except Exception:
            continue
    return None


def _smaller(config: Any) -> Iterator[Any]:
    """Configs to try in turn."""
    count = getattr(config, "num_hidden_layers", None)
    if count is None:  # one with images
        return
    chosen = [_representative(config, min(depth, count)) for depth in range(DEPTH, 0, -1)]
    for kept in [*chosen, range(count)]:
        small = copy.deepcopy(config)
        if len(kept) < count:
            keep_layers(small, kept)
        yield _narrow(small)


def _representative(config: Any, depth: int) -> list[int]:
    """The first layers, so many or one of each kind."""
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    first = sorted({kind: layer for layer, kind in reversed([*enumerate(kinds)])}.values())
    others = [layer for layer in range(len(kinds)) if layer not in first]
    return sorted([*first, *others[: max(0, depth - len(first))]])


def _narrow(config: Any) -> Any:
    for key, size in config.to_dict().items():
        if isinstance(size, int) and key.startswith("vocab_size"):
            setattr(config, key, min(VOCABULARY, size))
        elif isinstance(size, int) and any(name in key for name in INTERMEDIATE_KEYS):
            setattr(config, key, min(INTERMEDIATE, size))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, 0)
    return config


def _random(config: Any) -> Any:
    """None where it would be large."""
    from transformers import AutoModel

    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if num_parameters > MOST_PARAMETERS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModel.from_config(config, dtype=torch.float32).eval()


def _states(backbone: Any, **inputs: Any) -> torch.Tensor:
    found = backbone(**inputs)
    states_TC: torch.Tensor = found[0][0]  # logits, where a model has no decoder of its own
    return states_TC


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Windows and chunks of a few tokens, where a config has any."""
    sizes = {key: size for key in SIZES.values() if (size := getattr(config, key, None))}
    for key, size in sizes.items():
        setattr(config, key, min(size, WINDOW))
    try:
        yield
    finally:
        for key, size in sizes.items():
            setattr(config, key, size)
