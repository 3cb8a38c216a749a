"""Whether a model computes in a packed tree what it computes for every path on its own.

Masks and positions can be given to most decoders, but some do not follow them: they count positions themselves, add
biases by place in the row, or look ahead. Their values would be wrong without a word, so every architecture is tried on
a tree of a few tokens before it is used.

Shapes: T tokens of a path, S of the tree, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from mavis_dist.models.directory import quiet
from mavis_dist.models.masks import SIZES, check_masks, refusal, text_config, tree_inputs
from mavis_dist.models.states import truncate
from mavis_dist.types import one_line

WINDOW = 4  # tokens, during the trial: windows and chunks of real models are longer than any tree of a few tokens
SHARED, BRANCH = 7, 8  # tokens of the tree: the common start of its two paths, and the rest of each
TOLERANCE, TOLERANCE_ROUNDED = 1e-3, 0.05  # relative error of states; in less than single precision (right: 0.01)
DEPTH, VOCABULARY, MOST_PARAMETERS = 4, 128, 1_000_000_000  # of a model with random weights

_TRIED: WeakSet[nn.Module] = WeakSet()


def try_model(backbone: Any) -> None:
    """Three passes of a decoder over some tokens, the first time that it is asked about. In place of a decoder without
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
    try:
        with torch.no_grad(), _short_windows(text_config(backbone)):
            error = tree_error(backbone)
    # Whatever the code of a model raises about arguments that it does not expect.
    except Exception as failure:
        raise refusal(backbone, f"it fails on a tree of a few tokens: {one_line(failure)}") from failure
    if not error < (TOLERANCE if backbone.dtype == torch.float32 else TOLERANCE_ROUNDED):
        raise refusal(backbone, "it does not follow positions and masks that are given to it")
    _TRIED.add(backbone)


def tree_error(backbone: Any) -> float:
    """The relative error of the hidden states of a packed tree against one forward pass per path, of the worse one of
    two branches: the largest of its tokens, and in less than single precision the median, as rounding may send single
    tokens to other experts.
    """
    first, second = SHARED + BRANCH, SHARED + 2 * BRANCH  # ends of the two paths in the tree
    tokens_S = (torch.arange(second, device=backbone.device) * 5 + 5) % min(89, text_config(backbone).vocab_size)
    positions_S = torch.cat([torch.arange(first), torch.arange(SHARED, first)])
    mask_SS = torch.ones(second, second, dtype=torch.bool).tril()
    mask_SS[first:, SHARED:first] = False
    tree = _states(backbone, **tree_inputs(backbone, tokens_S[None], positions_S[None], mask_SS[None]))
    quantile, errors = 1.0 if backbone.dtype == torch.float32 else 0.5, []
    for path in ([*range(first)], [*range(SHARED), *range(first, second)]):
        found_TC, right_TC = tree[path[SHARED:]], _states(backbone, input_ids=tokens_S[path][None])[SHARED:]
        errors.append(((found_TC - right_TC).norm(dim=-1) / right_TC.norm(dim=-1)).quantile(quantile))
    return float(torch.stack(errors).max())


def _with_random_weights(config: Any) -> Any:
    """A decoder with a few of the layers and tokens; None where that does not work: very large models, and those with
    images.
    """
    from transformers import AutoModel

    try:
        with quiet():
            small = _small(config)
            with torch.device("meta"):
                num_parameters = sum(parameter.numel() for parameter in AutoModel.from_config(small).parameters())
            if num_parameters > MOST_PARAMETERS:
                return None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return AutoModel.from_config(small, dtype=torch.float32).eval()
    # An architecture may refuse these sizes, in any way, and be right in its own.
    except Exception:
        return None


def _small(config: Any) -> Any:
    config = copy.deepcopy(config)
    truncate(config, min(DEPTH, config.num_hidden_layers))
    config.vocab_size = min(VOCABULARY, config.vocab_size)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, 0)
    return config


def _states(backbone: Any, **inputs: Any) -> torch.Tensor:
    found = backbone(**inputs)
    states_TC: torch.Tensor = found[0][0].float()  # logits, where a model has no decoder of its own
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
