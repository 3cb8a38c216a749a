"""The native forward pass against transformers' own, and what it promises beyond: rows that never notice each other.

Shapes: N tokens of a step, R read tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from mavis_dist.models.decoder import HFDecoder, base_decoder, student_decoder, value_decoder
from mavis_dist.models.fused import FusedDecoder
from mavis_dist.models.kv import SlotModel
from mavis_dist.models.native import NativeDecoder
from mavis_dist.models.packed import pack, unpack
from mavis_dist.models.qhead import QHead, Student
from mavis_dist.models.value import ValueModel
from mavis_dist.native import build
from tests.fakes import LLAMA3, peaked
from tests.root import ROOT

pytestmark = pytest.mark.skipif(not build.is_loaded(), reason="the native forward pass cannot be compiled here")

VOCABULARY = 199  # not a multiple of any panel
MODELS = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head tied": ("llama", {"tie_word_embeddings": True}),
    "llama, heads of 96": ("llama", {"head_dim": 96}),
    "llama, heads of 128, one key head": ("llama", {"head_dim": 128, "num_key_value_heads": 1}),
    "llama, a key head each": ("llama", {"num_key_value_heads": 4}),
    "llama, seven queries of a key head": ("llama", {"hidden_size": 224, "num_attention_heads": 14}),
    "llama, llama3 rotation": ("llama", {"rope_parameters": LLAMA3}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
}


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, **more):
    """A random model with a peaked distribution and nonzero biases."""
    kind, fields = MODELS[name]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | fields | more))
    return peaked(model, 3.0).to(dtype).eval()


def plain(model) -> SlotModel:
    """Transformers' own forward pass over the same cache; of a copy, since the native pass rearranges weights."""
    model = copy.deepcopy(model)
    return SlotModel(HFDecoder(model.base_model, lambda **inputs: model(**inputs).logits))


def native(model) -> SlotModel:
    decoder = base_decoder(model)
    assert isinstance(decoder, NativeDecoder)
    return SlotModel(decoder)


def outputs(slots: SlotModel) -> list[torch.Tensor]:
    """Of prompts of different lengths, pieces beside appended tokens, alternatives, and what follows a kept one."""
    for row in range(3):
        slots.open(row)
    seen = [slots.extend([0, 1, 2], [list(range(5, 45)), [7], list(range(60, 75))])]
    seen.append(slots.extend([2, 0], [[9], list(range(100, 120))], [1, 3]))
    seen.append(slots.branch([1, 2, 0], [2, 5, 1], torch.arange(20, 28)))
    seen.append(slots.branch([2], [3], torch.arange(30, 33)))
    slots.keep([2, 1], torch.tensor([6, 1]))
    seen.append(slots.extend([0, 1, 2], [[50], [51], [52]]))
    slots.open(3, source=0, shared=30)
    seen.append(slots.extend([3], [[80, 81]]))
    slots.close(1)
    seen.append(slots.extend([3, 0], [[90], [91]]))
    return seen


@pytest.mark.parametrize("name", list(MODELS))
def test_it_equals_transformers_in_single_precision(name):
    model = tiny(name)
    for expected, out in zip(outputs(plain(model)), outputs(native(model)), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", list(MODELS))
def test_its_rounding_in_half_precision_is_no_worse_than_transformers(name):
    """Distances to single precision, with the same rounded weights."""
    model = tiny(name, torch.bfloat16)
    exact = torch.cat(outputs(plain(copy.deepcopy(model).float())))
    rounded, out = torch.cat(outputs(plain(model))).float(), torch.cat(outputs(native(model))).float()
    assert (out - exact).norm() <= 1.2 * (rounded - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_rows_outputs_do_not_depend_on_its_neighbours(dtype, data):
    """To the last bit: whatever the other rows, their order, the slot, the pieces of the prompt, and the threads."""
    model, decoder = NEIGHBOURS[dtype]
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=70)
    prompt, candidates = data.draw(tokens), data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9))
    alone = SlotModel(decoder(model))
    alone.open(0)
    expected = alone.extend([0], [prompt])[0], alone.branch([0], [len(candidates)], torch.tensor(candidates))

    others = data.draw(st.lists(tokens, max_size=5))
    mine = data.draw(st.integers(0, len(others)))
    cut = data.draw(st.integers(0, len(prompt) - 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    try:
        crowded = SlotModel(decoder(model))
        rows = data.draw(st.permutations(range(len(others) + 1)))
        contents = [*others[:mine], prompt[cut:], *others[mine:]]
        crowded.open(mine)
        if cut:
            crowded.extend([mine], [prompt[:cut]])
        for row in rows:
            if row != mine:
                crowded.open(row)
        extended = crowded.extend(rows, [contents[row] for row in rows])[list(rows).index(mine)]
        counts = [len(candidates) if row == mine else 1 + row for row in rows]
        start = dict(zip(rows, accumulate(counts, initial=0), strict=False))[mine]
        flat = [
            token for row, n in zip(rows, counts, strict=True) for token in (candidates if row == mine else [3] * n)
        ]
        branched = crowded.branch(rows, counts, torch.tensor(flat))[start : start + len(candidates)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(extended, expected[0])
    assert torch.equal(branched, expected[1])


NEIGHBOURS = {dtype: (tiny("qwen2", dtype), base_decoder) for dtype in (torch.float32, torch.bfloat16)}


def valued(dtype: torch.dtype, objectives: int = 3) -> ValueModel:
    model = ValueModel(tiny("llama", torch.float32).base_model, objectives)
    torch.nn.init.normal_(model.heads.weight)
    torch.nn.init.normal_(model.heads.bias)
    return model.to_precision(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_all_heads_equal_the_model(dtype):
    model = valued(dtype)
    ids = [5, 6, 7, 8, 9]
    expected = model(input_ids=torch.tensor([ids]), use_cache=False)[0, -1]
    slots = SlotModel(value_decoder(model))
    slots.open(0)
    out = slots.extend([0], [ids])[0]
    assert out.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_further_head_does_not_change_the_others():
    model = valued(torch.bfloat16)

    def values() -> torch.Tensor:
        slots = SlotModel(value_decoder(model))
        slots.open(0)
        return slots.extend([0], [[5, 6, 7]])[0]

    before = values()
    model.add_objective()
    model.requires_grad_(False)
    assert torch.equal(values()[:3], before)


def test_a_student_is_decoded_natively():
    model = valued(torch.float32)
    qhead = QHead(model.heads.in_features, 3, rank=8)
    for query in qhead.queries:
        torch.nn.init.normal_(query.get_parameter("weight"))
    student = Student(model, qhead).eval().requires_grad_(False)
    expected = student(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)[0, -1]
    slots = SlotModel(student_decoder(student))
    slots.open(0)
    torch.testing.assert_close(slots.extend([0], [[5, 6, 7]])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_forward_pass_goes_on_with_the_packed_weights(name, dtype):
    model, ids = tiny(name, dtype), torch.tensor([[5, 6, 7], [8, 9, 10]])
    state = {key: weight.clone() for key, weight in model.state_dict().items()}
    expected = model(input_ids=ids).logits
    base_decoder(model)
    packed = model.state_dict()
    assert packed.keys() == state.keys()
    assert all(torch.equal(state[key], weight) for key, weight in packed.items())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    tolerances = {"rtol": tolerance, "atol": tolerance * float(expected.abs().max())}
    torch.testing.assert_close(model(input_ids=ids).logits, expected, **tolerances)
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=1).logits, expected[:, -1:], **tolerances)
    tokens = model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert tokens.shape == (2, 7)


def test_weights_are_held_once():
    model = tiny("llama, head tied")
    numbers = sum(weight.numel() for weight in model.state_dict().values()) - model.lm_head.weight.numel()
    base_decoder(model)
    storages = {}
    for module in model.modules():
        for tensor in (*vars(module).values(), *module.parameters(recurse=False)):
            if isinstance(tensor, torch.Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
    assert sum(storages.values()) < 1.1 * numbers


def test_a_copy_of_a_packed_model_is_packed_anew():
    model = tiny("qwen2", torch.bfloat16)
    [first, *_] = outputs(native(model))
    [second, *_] = outputs(native(copy.deepcopy(model)))
    assert torch.equal(first, second)


def test_a_model_that_may_be_trained_keeps_its_own_weights():
    model = tiny().requires_grad_(True)
    base_decoder(model)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 80}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
        ("mistral without window", {"sliding_window": 16}),
    ],
)
def test_other_models_are_left_to_the_other_decoders(name, fields):
    assert not NativeDecoder.supports(tiny(name, **fields).base_model)


def test_models_with_adapters_are_left_to_the_other_decoders():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).base_model.model
    assert not NativeDecoder.supports(model.model)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_loses_nothing(width, dtype):
    weight = torch.randn(77, 96).to(dtype)
    assert torch.equal(unpack(pack(weight, width), 77), weight)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), size=st.integers(1, 3000), data=st.data())
def test_the_largest_logits_are_those_of_a_sort(seed, rows, size, data):
    """With many equal logits, and in the order of ids where they are equal."""
    k = data.draw(st.integers(1, min(size, 64)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-9, 9, (rows, size), generator=generator).to(dtype)
    logits[torch.rand(rows, size, generator=generator) < 0.2] = float("-inf")
    expected, ids = logits.sort(dim=-1, descending=True, stable=True)
    values, found = torch.ops.mavis.largest(logits, k)
    assert torch.equal(found, ids[:, :k])
    assert torch.equal(values.to(dtype), expected[:, :k])


def test_a_number_that_is_not_finite_is_not_overlooked():
    logits = torch.zeros(1, 1000)
    logits[0, 500] = float("nan")
    assert torch.ops.mavis.largest(logits, 4)[0].isnan().any()


def test_without_a_compiler_the_other_decoders_take_over_and_it_is_said_once(tmp_path):
    program = (
        "import torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "from mavis_dist.models.decoder import base_decoder\n"
        "config = AutoConfig.for_model('llama', vocab_size=64, hidden_size=64, intermediate_size=64, head_dim=64,\n"
        "                              num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)\n"
        "for _ in range(2):\n"
        "    print(type(base_decoder(AutoModelForCausalLM.from_config(config).eval())).__name__)\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "MAVIS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == [FusedDecoder.__name__] * 2
    assert done.stderr.count("compiler") == 1
