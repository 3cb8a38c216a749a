"""The value model: a decoder with the base model's tokenizer and one linear head per objective.

The decoder is a model of its own, or the first layers of the base model as they are: then a value model is a head on
the base model's hidden states, and costs no memory beside it.

On disk a value model is a folder: config.json (the backbone), model.safetensors (heads, and the backbone if it is a
model of its own) and mavis.json (its card). Loading is strict: a missing head is an error and is never initialised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mavis_dist.models.directory import WITHOUT_WEIGHTS, ModelError, quiet, read_config, read_model
from mavis_dist.models.lockstep import Leader, ShardError, check_shards, leader_of
from mavis_dist.models.states import first_layers, states_width, truncate
from mavis_dist.models.trial import try_model
from mavis_dist.types import R2_KEY, RewardScale, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mavis_dist.models.load import BaseModel

CARD_FILE = "mavis.json"
HEADS_PREFIX = "heads."


class ValueModelError(UserError):
    """A value model that cannot be used here."""


@dataclass(frozen=True)
class Teacher:
    """A value model that an objective of another one was distilled from."""

    objective: str
    iteration: int
    fingerprint: str  # of its weights: a retrained model counts as another one


@dataclass(frozen=True)
class Card:
    """What a value model was trained on and for; stored beside its weights."""

    objectives: tuple[str, ...]
    scales: tuple[RewardScale, ...]
    rewards: tuple[dict[str, Any], ...]  # the objectives' config
    iteration: int
    parent: str | None  # where the training started: None (the base model) or the previous value model
    base_fingerprint: str
    tokenizer_fingerprint: str
    max_tokens: int  # longest answer of the training trees (T_max)
    beta: float  # strength of the policies that generated the training trees
    r2: float | None  # on validation trees, the mean over objectives; None without any
    teachers: tuple[Teacher, ...] = ()  # by objective, where the model was distilled from others
    state_layer: int | None = None  # layer of the base model whose states the heads read; None: a backbone of its own

    def only(self, objective: str) -> Card:
        """The card without all other objectives."""
        m = self.objectives.index(objective)
        return replace(self, objectives=(objective,), scales=(self.scales[m],), rewards=(self.rewards[m],))

    def check(self, base_fingerprint: str, tokenizer_fingerprint: str) -> None:
        """Raises ValueModelError unless the model was trained for this base model and tokenizer."""
        name = ", ".join(self.objectives)
        if self.tokenizer_fingerprint != tokenizer_fingerprint:
            raise ValueModelError(
                f"the value model of {name!r} was trained with tokenizer {self.tokenizer_fingerprint[:12]}, the base "
                f"model has {tokenizer_fingerprint[:12]}: train it again for this base model"
            )
        if self.base_fingerprint != base_fingerprint:
            raise ValueModelError(
                f"the value model of {name!r} was trained for base model {self.base_fingerprint[:12]}, this one is "
                f"{base_fingerprint[:12]}: serve the base model it was trained for, or train it again"
            )


class ValueModel(nn.Module):
    """V_m(s) at every token of a batch, in standard deviations of the objectives' rewards."""

    def __init__(self, backbone: PreTrainedModel, num_objectives: int):
        super().__init__()
        self.backbone = backbone
        # Single precision: differences of values are small and are multiplied by beta.
        self.heads = Heads(states_width(backbone.config), num_objectives, dtype=torch.float32)

    @property
    def num_objectives(self) -> int:
        return len(self.heads.bias)

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Values [B, T, M] in float32, for the arguments of a Hugging Face decoder."""
        hidden_BTH = self.backbone(**inputs).last_hidden_state
        return self.heads(hidden_BTH.float())

    def add_objective(self) -> None:
        """Add a head, initially 0; the others do not change."""
        old = self.heads
        self.heads = Heads(old.in_features, old.out_features + 1, dtype=torch.float32, device=old.weight.device)
        with torch.no_grad():
            self.heads.weight[:-1], self.heads.bias[:-1] = old.weight, old.bias

    def only(self, objective: int) -> ValueModel:
        """A model on the same backbone, with a copy of the head of one objective."""
        old = self.heads
        one = ValueModel(self.backbone, 1)
        one.heads.to(old.weight.device)
        with torch.no_grad():
            one.heads.weight[:], one.heads.bias[:] = old.weight[objective], old.bias[objective]
        one.heads.requires_grad_(old.weight.requires_grad)
        return one.train(self.training)

    def to_precision(self, dtype: torch.dtype) -> ValueModel:
        """Cast the backbone; the heads stay in float32."""
        self.backbone.to(dtype=dtype)  # type: ignore[call-arg]
        return self


class Heads(nn.Linear):
    """One linear head per objective, initially 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_XH: torch.Tensor) -> torch.Tensor:
        """Values [X, M], one head at a time: the rounding of matrix kernels depends on the number of columns, and a new
        objective must not change the values of the others.
        """
        parts = zip(self.weight.split(1), self.bias.split(1), strict=True)
        return torch.cat([F.linear(hidden_XH, weight, bias) for weight, bias in parts], -1)


class JointHeads(nn.Module):
    """The heads of several value models on one backbone, in this order."""

    def __init__(self, parts: Sequence[nn.Linear]):
        super().__init__()
        self._parts = parts

    @property
    def weight(self) -> torch.Tensor:
        return torch.cat([part.weight for part in self._parts])

    @property
    def bias(self) -> torch.Tensor:
        return torch.cat([part.bias for part in self._parts])

    def forward(self, hidden_XH: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(hidden_XH) for part in self._parts], -1)


def from_base(folder: Path, layers: int | None, num_objectives: int = 1, has_weights: bool = True) -> ValueModel:
    """The first `layers` layers of the decoder in `folder` (None: all), with zero heads.

    Without weights it has shapes only (torch's device `meta`), in little time and memory.

    Raises:
        ValueModelError, ModelError: the folder cannot be read, or its model cannot be a value model.
    """
    from transformers import AutoModel

    config = read_config(folder)
    available = getattr(config, "num_hidden_layers", None)
    if available is None:
        raise ValueModelError(
            f"a model of type {config.model_type!r} cannot be a value model (it is more than one stack of layers): set "
            "value.backbone to a language model with the same tokenizer"
        )
    if layers is not None and layers > available:
        raise ValueModelError(f"value.layers is {layers} but {folder} has {available} layers: use at most {available}")
    truncate(config, layers or available)
    if has_weights:
        backbone = read_model(AutoModel, folder, optional=("pooler.",), config=config)
    else:
        with quiet(), torch.device("meta"):
            backbone = _backbone(config, **WITHOUT_WEIGHTS)
    try_model(backbone)
    return ValueModel(backbone.requires_grad_(True).train(), num_objectives)


def _backbone(config: Any, **options: Any) -> PreTrainedModel:
    from transformers import AutoModel

    return AutoModel.from_config(config, dtype=torch.float32, **options)


def joined(models: Sequence[ValueModel]) -> ValueModel:
    """Value models on one backbone as one, with all their heads in this order; they share the heads."""
    model = ValueModel(models[0].backbone, 0)
    model.heads = JointHeads([part.heads for part in models])  # type: ignore[assignment]
    return model


def save(model: ValueModel, card: Card, folder: Path) -> None:
    """Write the three files. The caller makes the folder appear whole."""
    folder.mkdir(parents=True, exist_ok=True)
    model.backbone.config.save_pretrained(folder)
    part, prefix = (model, "") if card.state_layer is None else (model.heads, HEADS_PREFIX)
    weights = {f"{prefix}{name}": tensor.detach().contiguous().cpu() for name, tensor in part.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    stored = {R2_KEY if name == "r2" else name: value for name, value in asdict(card).items()}
    if card.state_layer is None:
        del stored["state_layer"]
    (folder / CARD_FILE).write_text(json.dumps(stored, indent=1))


def load_card(folder: Path) -> Card:
    """Raises ValueModelError."""
    file = folder / CARD_FILE
    try:
        return parse_card(file.read_bytes(), str(file))
    except OSError as error:
        raise ValueModelError(f"{file} cannot be read ({error}): train this value model again") from None


def parse_card(content: bytes, file: str) -> Card:
    """The card in a file's content; raises ValueModelError, naming the file."""
    try:
        raw = json.loads(content)
        scales = tuple(RewardScale(**scale) for scale in raw.pop("scales"))
        objectives, rewards = tuple(raw.pop("objectives")), tuple(raw.pop("rewards"))
        teachers = tuple(Teacher(**teacher) for teacher in raw.pop("teachers", ()))
        r2 = raw.pop(R2_KEY)
        return Card(objectives=objectives, rewards=rewards, scales=scales, teachers=teachers, r2=r2, **raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueModelError(f"{file} cannot be read ({error}): train this value model again") from None


def load_objective(
    folder: Path,
    objective: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    base: BaseModel | None = None,
) -> tuple[ValueModel, Card]:
    """As `load`, without the heads of all other objectives."""
    model, card = load(folder, dtype, device, base)
    return model.only(card.objectives.index(objective)), card.only(objective)


def load(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", base: BaseModel | None = None
) -> tuple[ValueModel, Card]:
    """A value model ready for use.

    Where a group of processes computes the base model, one that is larger than a process's share of the base model is
    shared out like it.

    Args:
        dtype, device: of a model with a backbone of its own; a group has a device of its own.
        base: the base model, which heads on its hidden states need.

    Raises:
        ValueModelError: a file or tensor is missing or damaged, or heads were trained on states of another base model.
        ShardError: a process of the group does not have the folder.
    """
    card = load_card(folder)
    try:
        config = read_config(folder)
        leader = _sharing(card, config, base)
        weights = _read_weights(folder / "model.safetensors", with_backbone=leader is None)
        if card.state_layer is not None:
            backbone = _base_layers(card, card.state_layer, base)
        elif leader is not None:
            backbone = leader.load(folder, str(dtype).removeprefix("torch."))
        else:
            backbone = _backbone(config)
    except (OSError, ModelError, SafetensorError) as error:
        raise ValueModelError(f"the value model in {folder} cannot be read ({error}): train it again") from None
    model = ValueModel(backbone, len(card.objectives))
    is_whole = card.state_layer is None and leader is None
    try:
        if is_whole:
            model.load_state_dict(weights, strict=True)
        else:
            heads = {name.removeprefix(HEADS_PREFIX): tensor for name, tensor in weights.items()}
            model.heads.load_state_dict(heads, strict=True)
    except RuntimeError as error:
        raise ValueModelError(f"the value model in {folder} is incomplete: {' '.join(str(error).split())}") from None
    if is_whole:
        model.to_precision(dtype).to(device)
    else:
        model.heads.to(backbone.device)
    return model.eval().requires_grad_(False), card


def _read_weights(file: Path, with_backbone: bool) -> dict[str, torch.Tensor]:
    """All weights in a file, or those of the heads alone."""
    with safe_open(file, framework="pt") as stored:
        names = [name for name in stored.keys() if with_backbone or name.startswith(HEADS_PREFIX)]  # noqa: SIM118
        return {name: stored.get_tensor(name) for name in names}


def _sharing(card: Card, config: Any, base: BaseModel | None) -> Leader | None:
    """The leader of the group that shares out a value model; None: it stays whole."""
    leader = None if base is None else leader_of(base.model)
    if leader is None or card.state_layer is not None or card.teachers:  # a student reads states of the whole model
        return None
    assert base is not None
    with torch.device("meta"), quiet():
        model, whole = (_backbone(c, **WITHOUT_WEIGHTS) for c in (config, base.model.config.get_text_config()))
    if model.num_parameters() * leader.size <= whole.num_parameters():
        return None
    try:
        check_shards(model, ", ".join(card.objectives), leader.size)
    except ShardError:
        return None
    return leader


def _base_layers(card: Card, layer: int, base: BaseModel | None) -> PreTrainedModel:
    """The backbone of heads on a base model's states; raises ValueModelError."""
    if base is None:
        name = ", ".join(card.objectives)
        raise ValueModelError(f"the value model of {name!r} reads its base model's states: load it with a base model")
    card.check(base.fingerprint, base.tokenizer_fingerprint)
    if base.rows is not None:
        raise ValueModelError(
            f"the value model of {', '.join(card.objectives)!r} reads its base model's states, which base.engine=vllm "
            "does not give: use base.engine=builtin, or value models of kind model or shared"
        )
    if leader_of(base.model) is not None:
        raise ValueModelError(
            f"the value model of {', '.join(card.objectives)!r} reads its base model's states, which several processes "
            "share: use base.tensor_parallel=1, or value models of kind model or shared"
        )
    return first_layers(base.model, layer)
