"""One architecture through all that is done with models: trees, their packed pass, a fit, guided decoding.

Values are in units of their standard deviation, so errors are relative to what a value model distinguishes.

Shapes: S tokens of a packed tree, T tokens of a path, M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import tokenizers
import torch
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.models.architectures import BOS, EOS, VOCABULARY, NotTinyError, runs, tiny_model
from mavis_dist.config import Config
from mavis_dist.core import packing
from mavis_dist.core.tree import Shape, Tree, backup, targets
from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams
from mavis_dist.models.decoder import HFDecoder, value_decoder
from mavis_dist.models.directory import ModelError
from mavis_dist.models.kv import SlotModel
from mavis_dist.models.load import BaseModel
from mavis_dist.models.masks import check_masks, layer_types, text_config
from mavis_dist.models.states import first_layers
from mavis_dist.models.trial import try_first_layers, try_model
from mavis_dist.models.value import ValueModel
from mavis_dist.preflight import describe
from mavis_dist.preflight.checks import check_base, check_value
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.train import fit
from mavis_dist.train.data import TreeSet
from mavis_dist.types import Policy, Prompt

PROMPT, ANSWER = 24, 12  # tokens
SHAPE = Shape(2, 2, 2, ANSWER)
LEARNING_RATE = 1e-5  # small: the loss of one step then falls if its gradient is right
NOT_TINY, REFUSED, RIGHT = "not built tiny", "refused", "right"


def measure(name: str) -> dict[str, Any]:
    """What became of an architecture, one of `architectures.NAMES`.

    `packed`: the largest difference between values of a packed tree and of one forward pass of transformers per path.
    `states`: the same for heads on the states behind the first layer.
    `decoded`: the same for values while decoding, by transformers' pass over the slot cache and by the fastest decoder.
    """
    try:
        model: Any = tiny_model(name)
        check_masks(model.base_model)
        runs(model)
        try_model(model.base_model)
    except NotTinyError as error:
        return {"outcome": NOT_TINY, "reason": str(error)}
    except ModelError as error:
        return {"outcome": REFUSED, "reason": str(error)}
    base = base_model(model)
    engine = Engine(base)
    [tree] = grow(engine)
    value = value_model(decoder(model), tree)
    trees = tree_set(tree)
    figures = {
        "outcome": RIGHT,
        "attention": text_config(model)._attn_implementation,
        "layers": sorted(layer_types(model)),
        "packed": packed_error(value, trees),
        "decoded": max(decoded_error(value, tree, use_hf) for use_hf in (True, False)),
        "states": states_error(model, tree, trees),
        "guided": guided(base, value, tree),
    }
    preflight(model)
    before, after = losses(value, trees)
    return {**figures, "fitted": after < before}


def preflight(model: Any) -> None:
    """All checks of a run, and what they tell of its models, given the config of a model and a tokenizer alone. Raises
    UserError where they refuse it.
    """
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer = tokenizers.Tokenizer(WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, "<0>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=f"<{BOS}>", eos_token=f"<{EOS}>").save_pretrained(
            folder
        )
        config = Config(
            run="tiny",
            objectives={"value": {"reward": "sentiment"}},
            base={"model": folder, "dtype": "float32"},
            value={"layers": None},
        )
        base = check_base(config)
        value = check_value(config, base)
        for _, text in [*describe.base(config, base), *describe.value(config, base, value)]:
            assert "None" not in text, text


def states_error(model: Any, tree: Tree, trees: TreeSet) -> float | None:
    """As `packed`, of heads on the states behind the first layer; None where layers are not shared."""
    try:
        try_first_layers(decoder(model).config)
        view = first_layers(model, 1)
    except ModelError:
        return None
    return packed_error(value_model(view, tree), trees)


class Letters:
    """A tokenizer that only decodes, one character per token."""

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(chr(ord(" ") + token) for token in ids)


def base_model(model: Any) -> BaseModel:
    """The model as `load_base` returns it, without a tokenizer."""
    return BaseModel(model, cast(Any, Letters()), "tiny", "base", "tokenizer", (EOS,), 256)


def decoder(model: Any) -> Any:
    """The layers without the head, as `AutoModel` loads them."""
    return model.model if model.base_model is model else model.base_model


def prompt(seed: int = 1) -> tuple[int, ...]:
    return (BOS, *np.random.default_rng(seed).integers(EOS + 1, VOCABULARY, PROMPT - 1).tolist())


def grow(engine: Engine) -> list[Tree]:
    """The tree of one prompt, of the base policy."""
    grower = TreeGrower(engine, SHAPE, Policy(), Sampling(), 0)
    return list(grower.grow([Prompt("p", "")], [prompt()]))


@torch.no_grad()
def value_model(backbone: Any, tree: Tree) -> ValueModel:
    """A random head whose values on a tree have standard deviation 1."""
    model = ValueModel(backbone, 1).eval().requires_grad_(False)
    torch.nn.init.normal_(model.heads.weight, generator=torch.Generator().manual_seed(3))
    values = torch.cat([model(input_ids=path)[0] for path in paths(tree)])
    model.heads.weight /= values.std()
    return model


def tree_set(tree: Tree) -> TreeSet:
    rewards = {int(leaf): float(i % 3) for i, leaf in enumerate(tree.leaves())}
    return TreeSet([tree], [targets(tree, backup(tree, rewards), 0.0)], np.ones(SHAPE.layers + 1))


def paths(tree: Tree) -> list[torch.Tensor]:
    """Prompt and answer of every leaf, [1, T] each."""
    return [torch.tensor([[*tree.prompt_tokens.tolist(), *tree.answer(leaf).tolist()]]) for leaf in tree.leaves()]


@torch.no_grad()
def packed_error(model: ValueModel, trees: TreeSet) -> float:
    [tree] = trees.trees
    values_S = fit.outputs(model, trees.batch([0]))[0, :, 0]
    _, mask_SS = packing.visibility(tree)
    worst = 0.0
    for leaf, path in zip(tree.leaves(), paths(tree), strict=True):
        last = len(tree.prompt_tokens) + int(tree.node_start[leaf + 1]) - 1
        own_S = torch.from_numpy(np.flatnonzero(mask_SS[last]))
        worst = max(worst, float((values_S[own_S] - model(input_ids=path)[0, :, 0]).abs().max()))
    return worst


@torch.no_grad()
def decoded_error(model: ValueModel, tree: Tree, use_hf_forward: bool) -> float:
    """All paths side by side: prompts in pieces of different lengths, then tokens in turn appended, and kept from among
    alternatives.
    """
    right = [model(input_ids=path)[0, :, 0] for path in paths(tree)]
    tokens = [path[0].tolist() for path in paths(tree)]
    rows = list(range(len(tokens)))
    slots = SlotModel(HFDecoder(model.backbone, model) if use_hf_forward else value_decoder(model))
    worst = 0.0

    def compare(found: torch.Tensor, wanted: Sequence[torch.Tensor]) -> None:
        nonlocal worst
        worst = max(worst, float((found.flatten() - torch.stack(list(wanted))).abs().max()))

    for row in rows:
        slots.open(row)
        first, second = tokens[row][: 9 + row], tokens[row][9 + row : PROMPT]
        compare(slots.extend([row], [first], [len(first)]), right[row][: len(first)])
        compare(slots.extend([row], [second], [len(second)]), right[row][len(first) : PROMPT])
    for place in range(PROMPT, max(map(len, tokens))):
        rows = [row for row in rows if len(tokens[row]) > place]
        next_B = torch.tensor([tokens[row][place] for row in rows])
        wanted = [right[row][place] for row in rows]
        if place % 2:
            compare(slots.append(rows, next_B), wanted)
            continue
        others_B = (next_B + 5) % VOCABULARY
        found = slots.branch(rows, [3] * len(rows), torch.stack([others_B, next_B, others_B], 1).flatten())
        compare(found.view(-1, 3)[:, 1], wanted)
        slots.keep(rows, torch.ones(len(rows), dtype=torch.long))
    return worst


def guided(base: BaseModel, model: ValueModel, tree: Tree) -> bool:
    """Whether a guided answer differs from the base model's, and is the same beside another one."""
    engine = Engine(base, LocalGuide({"value": model}), max_rows=2)
    params = SamplingParams(max_tokens=ANSWER, seed=7)
    asked = [
        Request(
            name,
            tuple(tree.prompt_tokens.tolist()),
            weights={"value": weight} if weight else {},
            beta=30.0,
            params=params,
        )
        for name, weight in (("plain", 0.0), ("guided", 1.0), ("again", 1.0))
    ]
    [plain], [steered], [again] = engine.generate(asked)
    return steered.tokens != plain.tokens and steered.tokens == again.tokens


def losses(model: ValueModel, trees: TreeSet) -> list[float]:
    """The mean squared error before and after a step of a fit of everything but the token embeddings."""
    model.requires_grad_(True).backbone.get_input_embeddings().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, found = torch.optim.AdamW(trained, lr=LEARNING_RATE), []
    for _ in range(2):
        loss = fit.squared_error(model, trees, [0], "cpu") / trees.total_weight([0])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        found.append(loss.item())
    return found
