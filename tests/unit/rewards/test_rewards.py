"""Rewards: a score depends only on its pair, and unusable results are errors."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from mavis_dist import rewards, sections
from mavis_dist.models.load import ModelError
from mavis_dist.rewards.build import Checked
from mavis_dist.rewards.classifier import Classifier, fill
from mavis_dist.rewards.embedding import Relevance
from mavis_dist.rewards.limits import NO_LIMIT, max_tokens

WORDS = [*"a good bad bread rain prompt answer what is with end".split(), *"{ } , . ? {answer} {prompt}".split()]  # noqa: SIM905
SPECIAL = ["[PAD]", "[UNK]", "[EOS]"]


def save_tokenizer(directory, pad=True):
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "[PAD]"} if pad else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", model_max_length=16, **options
    )
    tokenizer.save_pretrained(directory)
    return len(vocabulary)


def bert_config(vocab_size, **extra):
    return BertConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, initializer_range=1.0, **extra,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("bert")
    labels = {0: "rude", 1: "kind", 2: "dull"}
    BertForSequenceClassification(bert_config(save_tokenizer(directory), id2label=labels)).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A causal reward model with one output and no padding token."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt2")
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 1.0}
    size = save_tokenizer(directory, pad=False)
    GPT2ForSequenceClassification(GPT2Config(vocab_size=size, num_labels=1, **shape)).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("embedder")
    BertModel(bert_config(save_tokenizer(directory)), add_pooling_layer=False).save_pretrained(directory)
    return str(directory)


PROMPTS = ["what is bread ?", "what is rain ?", "a { prompt } with braces", "what is bread ?", "good"]
ANSWERS = ["good bread", "bad rain is rain , a answer .", "", "is {answer} bad ? {prompt}", "a " * 40 + "good"]


@pytest.fixture(params=["sentiment", "brevity", "relevance", "classifier", "causal"])
def make(request, bert, gpt2, embedder):
    """A function from batch size to reward."""
    template = "what {prompt} is {answer} end"
    return {
        "sentiment": lambda size: rewards.build(sections.TextRule(reward="sentiment")),
        "brevity": lambda size: rewards.build(sections.TextRule(reward="brevity")),
        "relevance": lambda size: Relevance(embedder, batch_size=size),
        "classifier": lambda size: Classifier(bert, "kind", template, batch_size=size),
        "causal": lambda size: Classifier(gpt2, 0, template, batch_size=size),
    }[request.param]


def test_a_score_depends_on_its_pair_alone(make):
    reward = make(16)
    scores = reward.score(PROMPTS, ANSWERS)
    assert len(set(scores)) > 2
    assert reward.score(PROMPTS[::-1], ANSWERS[::-1]) == pytest.approx(scores[::-1], abs=1e-4)
    assert make(2).score(PROMPTS, ANSWERS) == pytest.approx(scores, abs=1e-4)
    alone = [make(1).score([prompt], [answer])[0] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert alone == pytest.approx(scores, abs=1e-4)


def test_braces_in_texts_are_kept():
    assert fill("{prompt}|{answer}|{x}", "{answer}{0}", "{prompt}%s\\1") == "{answer}{0}|{prompt}%s\\1|{x}"


def test_text_rules():
    sentiment, brevity = (rewards.build(sections.TextRule(reward=kind)) for kind in ("sentiment", "brevity"))
    good, bad = sentiment.score(["q", "q"], ["What a wonderful day!", "This is a horrible mess."])
    assert -1 <= bad < 0 < good <= 1
    assert brevity.score(["q", "q"], ["three  short\nwords", ""]) == [-3.0, 0.0]


def test_relevance_of_equal_and_of_empty_texts(embedder):
    reward = rewards.build(sections.Relevance(reward="relevance", model=embedder))
    same, empty, blank = reward.score(["good bread"] * 3, ["good bread", "", " \n"])
    assert same == pytest.approx(1, abs=1e-5)
    assert (empty, blank) == (0.0, 0.0)


def test_a_label_by_name_is_the_label_by_index(bert):
    by_name, by_index = Classifier(bert, "kind"), Classifier(bert, 1)
    assert by_name.score(PROMPTS, ANSWERS) == by_index.score(PROMPTS, ANSWERS)


@pytest.mark.parametrize("label", ["gentle", 3, -1])
def test_an_unknown_label_lists_the_labels(bert, label):
    with pytest.raises(rewards.RewardError, match=r"no label .*: choose one of 0 \(rude\), 1 \(kind\), 2 \(dull\)"):
        rewards.build(sections.Classifier(reward="classifier", model=bert, label=label))


def test_probabilities_sum_to_one(bert):
    total = sum(Classifier(bert, label, output="probability").score(["a"], ["good bread"])[0] for label in range(3))
    assert total == pytest.approx(1)


def test_one_output_has_no_probability(gpt2):
    with pytest.raises(rewards.RewardError, match="set output to logit"):
        Classifier(gpt2, output="probability")


def test_long_texts_are_truncated_at_the_start(bert, gpt2):
    for model in (bert, gpt2):
        reward = Classifier(model, template="{prompt} {answer}")
        long = "rain " * 50
        near, far, other = reward.score([long, long + long, long], ["good", "good", "bad"])
        assert near == pytest.approx(far, abs=1e-5)
        assert near != pytest.approx(other, abs=1e-3)


def test_a_causal_reward_model_reads_the_last_token(gpt2):
    """Without a padding token, the score is read at an end-of-text token of the template."""
    reward = Classifier(gpt2, template="{answer} [EOS]")
    scores = reward.score(["", ""], ["good", "a longer bad answer"])
    ids = reward.tokenizer("good [EOS]", return_tensors="pt")["input_ids"]
    hidden = reward.model.transformer(ids).last_hidden_state[0, -1]
    assert scores[0] == pytest.approx(float(reward.model.score(hidden)), abs=1e-5)


def test_an_empty_text_has_a_score(bert, gpt2, embedder):
    for reward in (Classifier(bert), Classifier(gpt2), Relevance(embedder)):
        assert len(Checked(reward, "x").score(["", ""], ["", "good"])) == 2


def test_a_model_without_a_classification_head_is_rejected(embedder):
    with pytest.raises(ModelError, match=r"lacks the weights .*classifier"):
        Classifier(embedder)


def user_function(prompts, answers):
    return [float(len(answer)) for answer in answers]


RESULTS = {
    "short": lambda prompts, answers: [1.0],
    "nan": lambda prompts, answers: [1.0, float("nan")],
    "text": lambda prompts, answers: [1.0, "2.0"],
    "nothing": lambda prompts, answers: None,
    "missing": lambda prompts, answers: [1.0, None],
}


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(
        "def length(prompts, answers):\n    return [len(answer) for answer in answers]\nconstant = 3\n"
    )
    (tmp_path / "user_broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def build_function(path):
    return rewards.build(sections.Function(reward="function", path=path))


@pytest.mark.usefixtures("user_module")
def test_a_user_function():
    assert build_function("user_rewards:length").score(["q", "q"], ["four", ""]) == [4.0, 0.0]
    assert build_function("user_rewards:length").score([], []) == []


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("user_nowhere:length", "cannot be imported .*user_nowhere"),
        ("user_broken:length", "cannot be imported .*a_module_that_is_not_there"),
        ("user_rewards:width", "no such name"),
        ("user_rewards:constant", "has an object of type int"),
    ],
)
def test_an_unusable_function_is_named(path, sentence):
    with pytest.raises(rewards.RewardError, match=sentence):
        build_function(path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("short", "returned 1 scores for 2 answers"),
        ("nan", "returned nan for answer 1"),
        ("text", "returned '2.0' for answer 1"),
        ("nothing", "returned NoneType"),
        ("missing", "returned None for answer 1"),
    ],
)
def test_unusable_results_are_named(monkeypatch, user_module, name, sentence):
    import user_rewards

    monkeypatch.setattr(user_rewards, "length", RESULTS[name])
    with pytest.raises(rewards.RewardError, match=f"reward 'user_rewards:length' {sentence}"):
        build_function("user_rewards:length").score(["q", "q"], ["a", "b"])


def test_prompts_and_answers_must_have_equal_length():
    with pytest.raises(rewards.RewardError, match="1 prompts for 2 answers"):
        rewards.build(sections.TextRule(reward="brevity")).score(["q"], ["a", "b"])


def test_importing_rewards_is_light():
    heavy = "{'torch', 'transformers', 'ray', 'vaderSentiment'}"
    code = f"import sys, mavis_dist.rewards; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.real_model
def test_an_answer_on_the_topic_is_more_relevant():
    reward = rewards.build(sections.Relevance(reward="relevance"))
    question = "How do I bake bread at home?"
    on, off, empty = reward.score(
        [question] * 3,
        ["Mix flour, water, yeast and salt, knead the dough and bake it.", "The court adjourned at noon.", ""],
    )
    assert on > off + 0.3
    assert empty == 0.0


ROBERTA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def save_without_limit(model_class, config_class, directory, num_positions):
    """A model whose positions begin behind its padding id, and a tokenizer that states no limit."""
    torch.manual_seed(0)
    size = save_tokenizer(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(directory)
    config = config_class(
        vocab_size=size, max_position_embeddings=num_positions, pad_token_id=0, initializer_range=1.0, **ROBERTA
    )
    model_class(config).save_pretrained(directory)


@pytest.mark.parametrize(
    ("model_class", "config_class", "unused"),
    [
        (RobertaForSequenceClassification, RobertaConfig, 1),
        (XLMRobertaForSequenceClassification, XLMRobertaConfig, 1),
        (MPNetForSequenceClassification, MPNetConfig, 2),  # its padding id is always 1
        (BertForSequenceClassification, BertConfig, 0),
    ],
)
def test_texts_longer_than_a_classifiers_positions_are_cut_at_their_start(tmp_path, model_class, config_class, unused):
    save_without_limit(model_class, config_class, tmp_path, 514)
    reward = Classifier(str(tmp_path))
    words = (["good", "bread", "bad", "rain", "is", "a"] * 100)[:600]
    end = words[-(514 - unused) :]
    long, cut, other = reward.score([""] * 3, [" ".join(w) for w in (words, end, ["what", *end[1:]])])
    assert long == pytest.approx(cut, abs=1e-5)
    assert long != pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("positions", [None, 0, -1])
def test_a_model_that_states_no_positions_reads_as_much_as_its_tokenizer(positions):
    tokenizer, model = SimpleNamespace(model_max_length=512), torch.nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=positions)
    assert max_tokens(tokenizer, model) == 512
    tokenizer.model_max_length = 10**30
    assert max_tokens(tokenizer, model) == NO_LIMIT


@pytest.mark.parametrize("settings", [None, '{"max_seq_length": null}', '{"max_seq_length": 9}'])
def test_an_embedder_reads_as_much_as_it_has_positions(tmp_path, settings):
    save_without_limit(RobertaModel, RobertaConfig, tmp_path, 20)
    if settings:
        (tmp_path / "sentence_bert_config.json").write_text(settings)
    reward = Relevance(str(tmp_path))
    assert reward.max_tokens == (9 if settings and "9" in settings else 19)
    assert -1.001 <= reward.score(["what is bread ?"], ["good bread " * 300])[0] <= 1.001
