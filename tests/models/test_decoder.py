"""Tests of the decoders against transformers' values in tests/golden/, and of cache, masks, packing and gradients."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, LANGUAGE_MODELS, distance, stretch
from safetensors.torch import load_file

import minibalora as mb
from minibalora.models import decoder
from minibalora.models.decoder import KVCache, attention, visible
from minibalora.models.llama import RMSNorm, rotary_frequencies, swiglu


def golden(name: str):
    """Return model, ids, mask and transformers' logits of a tiny random checkpoint."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    mask = expected["attention_mask"]
    return mb.load_model(GOLDEN / name), expected["input_ids"], mask, expected["logits"]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    model, ids, mask, expected = golden(name)
    real = mask.bool()
    scale = expected[real].abs().max()
    assert (model(ids, mask) - expected)[real].abs().max() < 1e-5 * scale  # at most 1e-4 is required; measured 4e-7
    assert torch.equal(model(ids)[real], model(ids, mask)[real])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_bfloat16_stays_near_float32(name):
    _, ids, mask, expected = golden(name)
    logits = mb.load_model(GOLDEN / name, dtype=torch.bfloat16)(ids, mask).float()
    real = mask.bool()
    assert (logits - expected)[real].norm() < 0.03 * expected[real].norm()  # each rounding: 0.4 %; two blocks


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_padding_and_later_tokens_do_not_change_logits(name):
    model, ids, mask, _ = golden(name)
    length = 9
    alone = model(ids[1:2, :length])
    padded = ids.clone()
    padded[1, length:] = 7
    assert torch.allclose(model(padded, mask)[1, :length], alone[0], atol=1e-5)


def test_left_padding_is_refused():
    model, ids, mask, _ = golden("llama2")
    with pytest.raises(ValueError, match="right padding only"):
        model(ids, mask.flip(1))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_states_with_a_cache_equal_states_without(name):
    """Compare prompts of 17, 9 and 1 tokens plus four more tokens each with one pass over each whole row."""
    model, ids, mask, _ = golden(name)
    lengths, answers = mask.sum(1).tolist(), torch.randint(61, (3, 4))
    cache = KVCache(model.config, lengths, 17 + 4, torch.float32, torch.device("cpu"))
    model.hidden(ids, cache=cache)
    steps = torch.cat([model.hidden(token[:, None], cache=cache) for token in answers.T], dim=1)
    for row, length in enumerate(lengths):
        text = torch.cat([ids[row, :length], answers[row]])
        assert torch.allclose(steps[row], model.hidden(text[None])[0, length:], atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3], [6, 2]])
@pytest.mark.parametrize("name", ["llama3", "mistral_window", "qwen2_window", "gpt2", "mixtral", "gemma2"])
@torch.no_grad()
def test_states_of_several_tokens_with_a_cache_equal_states_without(name, lengths):
    """The second part of the text ends after the prompts. The cache is larger than GPT-2's table of positions."""
    model, width = mb.load_model(GOLDEN / name), max(lengths)
    ids = torch.randint(model.config.vocab_size, (2, width + 8))
    cache = KVCache(model.config, lengths, 30, torch.float32, torch.device("cpu"))
    states = torch.cat([model.hidden(part, cache=cache) for part in ids.split([2, 5, 1, width], dim=1)], dim=1)
    for row, length in enumerate(lengths):
        real = [*range(length), *range(width, width + 8)]
        assert torch.allclose(states[row, real], model.hidden(ids[row : row + 1, real])[0], atol=1e-5)


@pytest.mark.parametrize("name", ["llama2", "mistral_window"])
@torch.no_grad()
def test_rotary_positions_continue_beyond_the_context(name):
    model = mb.load_model(GOLDEN / name)
    model.config = replace(model.config, max_position_embeddings=5)
    ids = torch.randint(model.config.vocab_size, (2, 14))
    cache, first = model.prefill(ids[:, :4], [4, 4], room=10)
    states = torch.stack([first, *(model.decode(tokens, cache) for tokens in ids.T[4:])], dim=1)
    assert torch.allclose(states, model.hidden(ids)[:, 3:], atol=1e-5)


@pytest.mark.parametrize("name", ["llama2", "t5"])
@torch.no_grad()
def test_prefill_does_not_attend_to_columns_of_padding(name):
    model, ids = mb.load_model(GOLDEN / name), torch.randint(61, (2, 9))
    caches, firsts = zip(*(model.prefill(ids[:, :width], [5, 3], room=3) for width in (5, 9)), strict=True)
    assert torch.equal(*firsts) and torch.equal(*(model.decode(ids[:, 0], cache) for cache in caches))


@pytest.mark.parametrize("lengths", [[], [3], [3, 3, 3], [3, 10], [0, 3]])
@pytest.mark.parametrize("name", ["llama2", "t5"])
def test_prefill_refuses_lengths_that_do_not_fit(name, lengths):
    with pytest.raises(ValueError, match="give a length from 1 to T for each row"):
        mb.load_model(GOLDEN / name).prefill(torch.zeros(2, 9, dtype=torch.long), lengths, room=1)


@pytest.mark.parametrize("name", ["llama2", "gpt2", "gemma2", "t5"])
@torch.no_grad()
def test_a_full_cache_is_refused(name):
    """T5's room includes the start token, which the prefill reads."""
    model = mb.load_model(GOLDEN / name)
    cache, _ = model.prefill(torch.tensor([[5, 6, 7]]), [3], room=2)
    for _ in range(1 if name == "t5" else 2):
        model.decode(torch.tensor([8]), cache)
    with pytest.raises(ValueError, match=f"the cache has room for {2 if name == 't5' else 5} tokens"):
        model.decode(torch.tensor([8]), cache)


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 1)])
def test_no_rows_give_no_logits(name, shape):
    model = mb.load_model(GOLDEN / name)
    assert model(torch.zeros(shape, dtype=torch.long)).shape == (*shape, model.config.vocab_size)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2", "t5"])
@torch.no_grad()
def test_a_packed_row_may_have_no_wanted_tokens(name):
    model, ids = mb.load_model(GOLDEN / name), torch.randint(61, (9,))
    assert torch.allclose(model.packed(ids, [5, 4], [2, 0]), model.packed(ids[:5], [5], [2]), atol=1e-6)
    assert model.packed(ids, [5, 4], [0, 0]).shape == (0, model.config.hidden_size)


@pytest.mark.parametrize(("setting", "value"), [
    ("activation", "gelu"), ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"type": "dynamic", "factor": 4.0}),
])  # fmt: skip
def test_unknown_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"{setting.replace('scaling', 'type')} .* is not implemented"):
        replace(mb.load_model(GOLDEN / "llama2").config, **{setting: value})


def test_the_default_rope_type_scales_nothing():
    config = mb.load_model(GOLDEN / "llama2").config
    named = replace(config, rope_scaling={"rope_type": "default"})
    assert torch.equal(*(rotary_frequencies(each, torch.device("cpu")) for each in (config, named)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_of_one_query_equals_that_of_the_last_of_many(heads, kv_heads, is_masked):
    """One query takes the path without copies of shared keys; many queries take the path with copies."""
    q, k, v = torch.randn(3, heads, 7, 5), torch.randn(3, kv_heads, 7, 5), torch.randn(3, kv_heads, 7, 5)
    positions = torch.arange(7)[None]
    mask = visible(positions, positions, window=3) if is_masked else None
    last = attention(q[:, :, -1:], k, v, mask[:, :, -1:] if is_masked else None)
    assert torch.allclose(last, attention(q, k, v, mask)[:, :, -1:], atol=1e-6)


@torch.no_grad()
def test_logits_come_from_an_adapted_head():
    model, ids, *_ = golden("llama2")
    hidden, weight = model.hidden(ids), model.lm_head.weight
    model.lm_head = mb.LowRankLinear.from_linear(model.lm_head, rank=3, init="lora")
    model.lm_head.B.normal_()
    assert torch.allclose(model(ids), hidden @ (weight + model.lm_head.delta).T, atol=1e-4)


def test_head_of_hidden_equals_the_logits():
    model, ids, *_ = golden("gemma")
    assert model.hidden(ids).shape == (3, 17, 24)
    assert torch.equal(model.head(model.hidden(ids)), model(ids))


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """Compute what torch's GPU kernel of this name does: (T, heads, head_dim) -> the same, as in its docstring. A row's
    last query sees its last key; a query sees window_size[0] keys before its own (-1: all) and none after it."""
    left, right = window_size
    assert right == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    counts, key_counts = (starts.diff().tolist() for starts in (cu_seq_q, cu_seq_k))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and (max_q, max_k) == (max(counts), max(key_counts))
    outputs = []
    for row_q, row_k, row_v in zip(q.split(counts), k.split(key_counts), v.split(key_counts), strict=True):
        before = torch.arange(len(row_q))[:, None] + len(row_k) - len(row_q) - torch.arange(len(row_k))
        mask = (before >= 0) & (before <= left) if left >= 0 else before >= 0
        row = (t.transpose(0, 1) for t in (row_q, row_k, row_v))
        outputs.append(F.scaled_dot_product_attention(*row, attn_mask=mask, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("form", ["a call a row", "one call"])
@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name not in ("llama2", "mistral", "yi")])
@pytest.mark.parametrize("shared", [0, 1, 6])
def test_packed_rows_equal_rows_alone_in_value_and_gradient(name, shared, form, monkeypatch):
    """Use rows shorter and longer than mistral_window's window, and one row with a single wanted token."""
    torch.manual_seed(shared)
    if form == "one call":
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
        monkeypatch.setattr(decoder, "can_use_varlen", lambda q, dropout, cap: not dropout and cap is None)
    model = mb.adapt(mb.load_model(GOLDEN / name), rank=4)
    stretch(model)
    lengths, wanted = [13, 20, 9, 3], [5, 12, 2, 1]
    start = torch.randint(model.config.vocab_size, (shared,))
    rows = [torch.randint(model.config.vocab_size, (length,)) for length in lengths]
    packed = model.packed(torch.cat([start, *rows]), lengths, wanted, shared)
    row_counts = zip(rows, wanted, strict=True)
    alone = torch.cat([model.hidden(torch.cat([start, row])[None])[0, -count:] for row, count in row_counts])
    assert packed.shape == alone.shape and distance(packed, alone) < 1e-6
    upstream, trained = torch.randn_like(alone), [p for p in model.parameters() if p.requires_grad]
    gradients, expected = (torch.autograd.grad((states * upstream).sum(), trained) for states in (packed, alone))
    for a, b in zip(gradients, expected, strict=True):
        assert distance(a, b) < 1e-4


def test_packed_rows_do_not_see_each_other():
    model = mb.load_model(GOLDEN / "llama3")
    ids = torch.randint(model.config.vocab_size, (20,))
    other = torch.cat([ids[:12], (ids[12:] + 1) % model.config.vocab_size])
    first, second = (model.packed(tokens, [9, 8], [4, 8], shared=3) for tokens in (ids, other))
    assert torch.equal(first[:4], second[:4]) and not torch.allclose(first[4:], second[4:])


def test_rows_longer_than_the_learned_positions_are_refused():
    model = mb.load_model(GOLDEN / "gpt2")
    limit = model.config.max_position_embeddings
    ids = torch.zeros(limit + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="do not fit"):
        model.hidden(ids[None])
    with pytest.raises(ValueError, match="do not fit"):
        model.packed(ids, [limit], [1], shared=1)
    assert len(model.packed(torch.zeros(2 * limit, dtype=torch.long), [limit, limit], [1, 2])) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swiglu_has_the_value_and_gradient_of_its_formula(dtype):
    gate, up = (torch.randn(5, 7, dtype=dtype, requires_grad=True) for _ in range(2))
    upstream = torch.randn(5, 7, dtype=dtype)
    fused, plain = swiglu(gate, up), F.silu(gate) * up
    assert torch.equal(fused, plain)
    for a, b in zip(*(torch.autograd.grad((y * upstream).sum(), (gate, up)) for y in (fused, plain)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("change", ["load_state_dict", "in place", "data", "assigned", "dtype", "trained", "inference"])
def test_a_norm_with_an_offset_notices_every_change_of_its_weight(change):
    norm, x = RMSNorm(8, 1e-6, offset=1.0).requires_grad_(False), torch.randn(3, 8)
    weight = torch.linspace(-1, 1, 8)
    with torch.inference_mode(change == "inference"):
        norm(x)
    if change == "load_state_dict":
        norm.load_state_dict({"weight": weight})
    elif change == "in place":
        norm.weight.copy_(weight)
    elif change == "data":
        norm.weight.data.copy_(weight)
    elif change == "assigned":
        norm.weight.data = weight
    elif change == "inference":
        norm.weight.copy_(weight)
        x.requires_grad_()
    else:
        norm.weight.data = weight
        norm(x)
        norm = norm.bfloat16() if change == "dtype" else norm.requires_grad_()
    y = norm(x)
    assert torch.allclose(y, F.rms_norm(x, (8,), 1 + norm.weight.float(), 1e-6))
    if change in ("trained", "inference"):
        y.sum().backward()
        assert (norm.weight if change == "trained" else x).grad.abs().sum() > 0


def test_a_second_derivative_of_swiglu_is_refused():
    gate = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        torch.autograd.grad(swiglu(gate, gate).sum(), gate, create_graph=True)
