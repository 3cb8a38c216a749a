"""Invalid bodies are refused with the field's name, errors have OpenAI's format, weights come from either field."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import get_args

import pytest
from pydantic import ValidationError

from mavis_dist.core.preferences import Accumulation
from mavis_dist.decode import PRESETS
from serve.gateway.protocol import ApiError, event
from serve.gateway.requests import (
    ChatRequest,
    GenerationRequest,
    Message,
    PreferenceParams,
    StreamOptions,
    TextRequest,
    refusal,
)

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(**body):
    return ChatRequest.model_validate({"model": "m", "messages": MESSAGES, **body})


def refused(**body) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        chat(**body)
    return refusal(caught.value.errors())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"50256": -100}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", float("nan")),
        ("store", True),
        ("reasoning_effort", "low"),
        ("guided_json", {}),
        ("detokenize", False),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(name, value):
    error = refused(**{name: value})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_field")
    assert error.body["error"]["type"] == "invalid_request_error"
    assert "remove it" in error.message


@pytest.mark.parametrize("model", [ChatRequest, TextRequest, Message, StreamOptions])
def test_fields_that_change_nothing_are_accepted_with_these_values_only(model):
    for name, values in model.NEUTRAL.items():
        assert name not in model.model_fields
        for value in (*values, None):
            bodies = {
                ChatRequest: {"messages": MESSAGES},
                TextRequest: {"prompt": "Hi"},
                Message: {"role": "user", "content": "Hi"},
            }
            body = bodies.get(model, {}) | ({"model": "m"} if issubclass(model, GenerationRequest) else {})
            assert model.model_validate({**body, name: value}) == model.model_validate(body)


def test_labels_change_nothing():
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "c"}
    assert chat(**labels).messages == chat().messages


def test_log_probabilities_as_the_two_endpoints_ask_for_them():
    assert chat().num_logprobs is chat(logprobs=False).num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).num_logprobs == 20
    assert "logprobs: true" in refused(top_logprobs=1).message
    assert chat(logprobs=False, top_logprobs=0).num_logprobs is None
    assert refused(logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert TextRequest.model_validate({"model": "m", "prompt": "a", "logprobs": 3}).num_logprobs == 3


def test_a_developer_message_is_a_system_message():
    message = chat(messages=[{"role": "developer", "content": "Be brief"}]).messages[0]
    assert message.turn == {"role": "system", "content": "Be brief"}


def test_errors_can_be_sent_whatever_the_client_sent():
    error = refused(**{"\ud800" * 5000: 1})
    assert len(error.message) < 1100
    assert json.dumps(error.body, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"n": 129}, "n"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"logprobs": 3}, "logprobs"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "x"}]}, "messages.0.name"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages.0.role"),
        ({"objective_weights": {"positive": float("nan")}}, "objective_weights.positive"),
        ({"objective_weights": ["positive"]}, "objective_weights"),
        ({"beta": -1.0}, "beta"),
        ({"tilt_cap": 0.0}, "tilt_cap"),
        ({"residual_cap": 0.0}, "residual_cap"),
        ({"scorer": "fastest"}, "scorer"),
        ({"guide_every": 0}, "guide_every"),
        ({"guide_every": 1.5}, "guide_every"),
        ({"guide_every": 2**63}, "guide_every"),
        ({"top_k": 2**63}, "top_k"),
        ({"stop": 5}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ""}, "stop.0"),
        ({"vllm_xargs": {"beta": 1}}, "vllm_xargs.objective_weights"),
        ({"preferences": [{"text": ""}]}, "preferences.0.text"),
        ({"preferences": [{"text": "a", "weight": float("inf")}]}, "preferences.0.weight"),
        ({"preferences": [{"weight": 1.0}]}, "preferences.0.text"),
        ({"preferences": ["a"]}, "preferences.0"),
        ({"preferences": [{"text": "a"}] * 65}, "preferences"),
        ({"preference_params": {"preset": "best"}}, "preference_params.preset"),
        ({"preference_params": {"steps": 1.5}}, "preference_params.steps"),
    ],
)
def test_a_bad_value_is_refused_with_the_path_of_its_field(body, param):
    error = refused(**body)
    assert error.status == 400
    assert error.param == param or error.code == "unsupported_field"
    assert json.dumps(error.body)


def test_an_unknown_field_is_named_before_any_other_error():
    assert refused(temperature=-1, reponse_format={}).param == "reponse_format"


def test_two_limits_and_stream_options_without_a_stream_are_refused():
    assert "not both" in refused(max_tokens=1, max_completion_tokens=2).message
    assert "stream: true" in refused(stream_options={"include_usage": True}).message


def test_one_stop_string_or_several():
    assert chat().stops == chat(stop=[]).stops == ()
    assert chat(stop="END").stops == ("END",)
    assert chat(stop=["a", "b", "c", "d"]).stops == ("a", "b", "c", "d")


def test_weights_come_from_the_nested_or_the_flat_field():
    assert chat().weights() == {}
    assert chat(objective_weights={"brief": 1}).weights() == {"brief": 1.0}
    assert chat(vllm_xargs={"objective_weights": "positive=0.7, brief=0.3"}).weights() == {
        "positive": 0.7,
        "brief": 0.3,
    }
    with pytest.raises(ApiError) as caught:
        chat(objective_weights={"brief": 1}, vllm_xargs={"objective_weights": "brief=1"}).weights()
    assert caught.value.param == "vllm_xargs"


@pytest.mark.parametrize("text", ["brief", "brief=", "=1", "brief=x", "brief=nan", "brief=1,brief=2"])
def test_flat_weights_that_cannot_be_read_are_refused(text):
    with pytest.raises(ApiError) as caught:
        chat(vllm_xargs={"objective_weights": text}).weights()
    assert caught.value.param == "vllm_xargs.objective_weights"


def test_presets_are_those_of_the_engine():
    known = PreferenceParams.model_fields
    assert get_args(known["preset"].annotation) == tuple(PRESETS)
    assert known.keys() - {"preset"} == {field.name for field in fields(PRESETS["mato"])}
    accumulations = get_args(get_args(known["accumulation"].annotation)[0])
    assert accumulations == tuple(a.value for a in Accumulation)


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert refused(messages=[{"role": "user", "content": image}]).status == 400


def test_prompt_must_not_be_empty():
    with pytest.raises(ValidationError) as caught:
        TextRequest.model_validate({"model": "m", "prompt": ""})
    assert refusal(caught.value.errors()).param == "prompt"


def test_events_are_one_line_of_json():
    assert event({"text": "a\nb é"}) == 'data: {"text": "a\\nb é"}\n\n'


def text(**body):
    return TextRequest.model_validate({"model": "m", "prompt": "Hi", **body})


def text_refused(**body) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        text(**body)
    return refusal(caught.value.errors())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a"], ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_one_prompt_or_several_as_text_or_as_token_ids(prompt, prompts):
    assert text(prompt=prompt).prompts == prompts
    assert text(prompt=prompt, n=3).num_answers == 3 * len(prompts)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (5, "prompt"),
        (None, "prompt"),
        ({"a": 1}, "prompt"),
        ([], "prompt"),
        ([[]], "prompt.0"),
        (["a", ""], "prompt.1"),
        (["a", 1], "prompt.1"),
        ([1, "a"], "prompt.1"),
        ([1, -1], "prompt.1"),
        ([1, 2.5], "prompt.1"),
        ([True], "prompt.0"),
        ([[1], "a"], "prompt.1"),
        ([[1], [2, None]], "prompt.1.1"),
        ([None], "prompt.0"),
    ],
)
def test_a_prompt_of_another_form_is_refused_where_it_is(prompt, param):
    assert (text_refused(prompt=prompt).status, text_refused(prompt=prompt).param) == (400, param)


def test_remedies_work_on_the_endpoint_that_gives_them():
    for name in (
        ChatRequest.NEUTRAL.keys() | TextRequest.NEUTRAL.keys() | {"best_of", "messages", "prompt", "max_new_tokens"}
    ):
        for ask, refuse, model in ((chat, refused, ChatRequest), (text, text_refused, TextRequest)):
            if name in model.model_fields:
                continue
            error = refuse(**{name: "odd"})
            assert (error.param, error.code) == (name, "unsupported_field")
            if "or give" in error.message:
                ask(**{name: json.loads(error.message.partition("or give ")[2])})
    assert refused(best_of=1).message == "the field 'best_of' is not supported; remove it, and use n"
    assert "use /v1/chat/completions" in text_refused(messages=MESSAGES).message
    assert "x-request-id" in refused(request_id="r").message
    assert "; remove it" in refused(messages=[{"role": "user", "content": "a", "name": "b"}]).message


def test_a_message_is_continued_or_a_new_one_begun():
    options = ("continue_final_message", "add_generation_prompt")
    for asked, taken in (
        ({}, (False, True)),
        ({"continue_final_message": True}, (True, False)),
        ({"continue_final_message": True, "add_generation_prompt": False}, (True, False)),
        ({"add_generation_prompt": False}, (False, False)),
    ):
        assert tuple(chat(**asked).template_options[name] for name in options) == taken
    assert "not both" in refused(continue_final_message=True, add_generation_prompt=True).message


def test_log_probabilities_are_not_those_of_the_prompt():
    assert "leave out echo or logprobs" in text_refused(echo=True, logprobs=1).message


@pytest.mark.parametrize("name", ["reasoning_effort", "verbosity", "structured_outputs", "cache_salt", "unheard_of"])
def test_null_is_as_good_as_absent(name):
    assert chat(**{name: None}) == chat()
    assert text(**{name: None}) == text()
    assert chat(messages=[{**MESSAGES[0], name: None}]) == chat()
    assert chat(stream=True, stream_options={"include_usage": None, name: None}).wants_usage is False
    assert text(messages=None, max_completion_tokens=None) == text()
    assert refused(model=None).param == "model"


def of_content(content, role="user") -> ApiError:
    return refused(messages=[{"role": role, "content": content}])


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "tool", "tool_call_id": "1", "content": "a"}, "role", "'tool' is not supported; use 'system'"),
        ({"role": "tool", "tool_call_id": "1"}, "role", "use 'system'"),
        ({"role": "function", "tool_calls": [1], "content": "a"}, "role", "'function' is not supported"),
        ({"role": ["user"], "content": "a"}, "role", "['user'] is not supported"),
        ({"role": "assistant", "content": None}, "content", 'use a text, or a list of parts such as {"type"'),
        ({"role": "user", "content": 5}, "content", "use a text"),
        ({"role": "user", "content": ["a"]}, "content.0", "use an object with 'type' and 'text'"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content.0.type",
            "'image_url' is not supported; use 'text'",
        ),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}]}, "content.0.type", "use 'text'"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}, "content.0.cache", "remove it"),
    ],
)
def test_what_is_wrong_with_a_message_is_named_with_a_remedy_that_works(message, param, words):
    error = refused(messages=[message])
    assert error.param == f"messages.0.{param}"
    assert words in error.message


def test_objects_and_numbers_of_another_type_get_a_remedy():
    assert "use an object with 'text'" in refused(preferences=["a"]).message
    assert "use an object" in refused(stream=True, stream_options=True).message
    assert "valid integer" in text_refused(prompt=[1.0]).message


@pytest.mark.parametrize("fault", ["\0", "\ud83d"])
def test_a_text_that_cannot_be_encoded_is_refused_where_it_is(fault):
    bad = f"x{fault}"
    assert text_refused(prompt=bad).param == "prompt"
    assert text_refused(prompt=["a", bad]).param == "prompt.1"
    assert refused(messages=[*MESSAGES, {"role": "user", "content": bad}]).param == "messages.1.content"
    assert of_content([{"type": "text", "text": bad}]).param == "messages.0.content.0.text"
    for refuse in (refused, text_refused):
        assert refuse(preferences=[{"text": "a"}, {"text": bad}]).param == "preferences.1.text"


@pytest.mark.parametrize("content", ["", " \n", []])
def test_a_message_without_text_is_not_continued(content):
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    error = refused(messages=messages, continue_final_message=True)
    assert error.param == "continue_final_message"
    assert "no text to continue: leave out this field" in error.message
    assert chat(messages=messages)
