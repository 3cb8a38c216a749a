"""A tiny random base model, its tokenizer and published value models, on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from mavis_dist.config import Config
from mavis_dist.models import qhead, value
from mavis_dist.models.load import load_base
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.types import RewardScale

MODEL = "tiny-llama"
LONGEST_ANSWER = 24  # of the trees behind `write_run`
BOS, EOS = 0, 1
# Printable ASCII, space and newline in byte-level spelling, and the two bytes of an e with an acute accent.
ALPHABET = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ", "Ã", "©"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Of letters, each also as the beginning of a word; a text's first space is lost, as with SentencePiece."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "▁", *letters, *(f"▁{a}" for a in letters)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", a) for a in letters]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_base(folder: Path, eos_weight: float = 0.0, head_size: int = 8) -> Path:
    """folder/tiny-llama: a two-layer Llama whose next-token distribution is not uniform.

    With `eos_weight` 0, end-of-text is never among the few most likely tokens; with 1 it is a token like any other.
    """
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_size,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    with torch.no_grad():
        base.lm_head.weight.mul_(10)
        base.lm_head.weight[EOS] *= eos_weight
    base.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    return folder / MODEL


def write_models(
    folder: Path,
    run: str,
    objectives: tuple[str, ...],
    longest_answer: int = 400,
    eos_weight: float = 0.0,
    head_size: int = 8,
) -> None:
    """folder/tiny-llama, and folder/runs/{run} with iteration 0 of every objective published.

    `longest_answer` is that of the trees which the value models were trained on, in tokens.
    """
    base = write_base(folder, eos_weight, head_size)
    loaded = load_base(str(base))
    store = Store(str(folder / "runs"), run)
    fingerprints = loaded.fingerprint, loaded.tokenizer_fingerprint
    for seed, objective in enumerate(objectives, 1):
        work, config = folder / "work" / objective, LlamaConfig.from_pretrained(base)
        _publish(store, work, objective, 0, seed, config, *fingerprints, longest_answer)


def write_run(folder: Path, run: str, objectives: tuple[str, ...], eos_weight: float = 0.0, head_size: int = 8) -> Path:
    """folder/runs/{run}: a finished run in single precision, as far as those who use its models can tell."""
    write_models(folder, run, objectives, LONGEST_ANSWER, eos_weight, head_size)
    config = Config(
        run=run,
        storage=str(folder / "elsewhere"),  # runs may be moved
        objectives={name: {"reward": "sentiment"} for name in objectives},
        base={"model": str(folder / MODEL), "dtype": "float32", "system": "Be good."},
        steer={"beta": 2.0, "tilt_cap": 2.5},
        serve={"max_tokens": 40},
    )
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    Store(str(folder / "runs"), run).write_bytes(layout.CONFIG_FILE, text.encode())
    return folder / "runs" / run


def publish_next(folder: Path, run: str, objective: str, iteration: int, seed: int) -> None:
    """Publish another iteration of an objective, or a new objective, in a run of `write_models`."""
    store, config = Store(str(folder / "runs"), run), LlamaConfig.from_pretrained(folder / MODEL)
    known = next(iter(values.published_folders(store).values()))
    card = value.load_card(values.fetch_folder(store, known))
    work = folder / "work" / f"{objective}-{iteration}"
    _publish(store, work, objective, iteration, seed, config, card.base_fingerprint, card.tokenizer_fingerprint)


def publish_distilled(folder: Path, run: str, names: tuple[str, str], name: str, parent: str | None = None) -> None:
    """Publish one model for both objectives of a run of `write_models`, with a student; `parent`: one it extends."""
    store = Store(str(folder / "runs"), run)
    model, card = value.load(values.fetch(store, names[0], 0))
    model.add_objective()
    torch.manual_seed(11)
    torch.nn.init.normal_(model.heads.weight, std=0.3)
    head = qhead.QHead(model.heads.in_features, 2, 4)
    for parameter in head.queries.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    teachers = tuple(value.Teacher(name, 0, "f") for name in names)
    card = replace(card, objectives=names, teachers=teachers, scales=card.scales * 2, rewards=card.rewards * 2)
    card = replace(card, parent=parent)
    value.save(model, card, folder / "student")
    qhead.save(head, folder / "student")
    store.upload(folder / "student", layout.distilled_folder(name), {})
    for objective in names:
        values.publish_distilled(store, objective, 0, name)


def count_vowels(prompts: list[str], answers: list[str]) -> list[float]:
    """A reward that a tiny model can learn."""
    return [float(sum(letter in "aeiou" for letter in answer.lower())) for answer in answers]


def count_capitals(prompts: list[str], answers: list[str]) -> list[float]:
    """Another one."""
    return [float(sum(letter.isupper() for letter in answer)) for answer in answers]


def always_one(prompts: list[str], answers: list[str]) -> list[float]:
    """A reward that nothing can be learnt from."""
    return [1.0 for _ in answers]


def _publish(
    store: Store,
    work: Path,
    objective: str,
    iteration: int,
    seed: int,
    config: LlamaConfig,
    base_fingerprint: str,
    tokenizer_fingerprint: str,
    longest_answer: int = 400,
) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1})
    model = value.ValueModel(LlamaModel(config), 1)
    torch.nn.init.normal_(model.heads.weight, std=0.3)
    card = value.Card(
        objectives=(objective,),
        scales=(RewardScale(0.0, 1.0),),
        rewards=({"reward": "sentiment"},),
        iteration=iteration,
        parent=None,
        base_fingerprint=base_fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint,
        max_tokens=longest_answer,
        beta=1.0,
        r2=None,
    )
    value.save(model, card, work)
    store.upload(work, layout.value_folder(objective, iteration), {"iteration": iteration})
    values.publish(store, objective, iteration)


def publish_shared(store: Store, folder: Path, objectives: tuple[str, ...], like: str) -> None:
    """Iteration 0 of several objectives as random heads of one model, with the backbone and the scale of another's."""
    model, card = value.load(values.fetch(store, like, 0))
    torch.manual_seed(12)
    shared = value.ValueModel(model.backbone, len(objectives))
    torch.nn.init.normal_(shared.heads.weight, std=0.3)
    count = len(objectives)
    card = replace(card, objectives=objectives, scales=card.scales * count, rewards=card.rewards * count)
    value.save(shared, card, folder / "shared")
    target = layout.shared_folder("-".join(objectives), 0)
    store.upload(folder / "shared", target, {})
    (folder / "figures").mkdir()
    for name in objectives:
        own = layout.value_folder(name, 0)
        store.delete(own)
        (folder / "figures" / layout.METRICS_FILE).write_text("")
        store.upload(folder / "figures", own, {values.SHARED_KEY: target})
        values.publish(store, name, 0)
