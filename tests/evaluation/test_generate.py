"""Decoding against transformers (committed golden values), its properties, and the command line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, LANGUAGE_MODELS, SEQ2SEQ, restless
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from torch import nn

import minibalora as mb
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.prompts import PROMPT, PROMPT_WITH_INPUT, example_from
from minibalora.evaluation import decoding as decoder
from minibalora.evaluation import generate as program
from minibalora.evaluation.decoding import (
    Decoding,
    StopWatch,
    before_stop,
    generate,
    generate_each,
    generate_ids,
    least_likely,
    sample,
)
from minibalora.models.decoder import KVCache
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

GREEDY = json.loads((GOLDEN / "greedy.json").read_text())
NOT_IN_TRANSFORMERS = {"deepseek", "deepseek_norm"}  # compared with their reference in test_mixture.py
PROMPTS = [example_from(row, line).prompt for line, row in enumerate(clean_problems(12, seed=5), start=1)]
SAMPLING = Decoding(max_new_tokens=40, temperature=1.5, top_p=0.9)


@pytest.fixture(scope="module")
def toy():
    return mb.load_model(MODEL), mb.load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def gpt2():
    """40 learned positions."""
    return restless(mb.load_model(GOLDEN / "gpt2"))


def tokenizer(*prompts, eos_id=None):
    """A tokenizer that encodes any texts as these prompts, and "decodes" ids to themselves."""
    return SimpleNamespace(
        encode_prompts=lambda texts: [list(prompt) for prompt in prompts],
        eos_ids=frozenset([eos_id]) - {None},
        is_chat=False,
        decode_after=lambda before, ids: list(ids),
    )


# transformers.


def test_every_language_model_has_greedy_texts_of_transformers():
    assert {*GREEDY} == {*LANGUAGE_MODELS, *SEQ2SEQ} - NOT_IN_TRANSFORMERS


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_ids_equal_those_of_transformers(name):
    """Each token leads the runner-up by at least 1.6e-3, and float32 rounds by about 1e-6."""
    model, expected = restless(mb.load_model(GOLDEN / name)), GREEDY[name]
    decoding = Decoding(max_new_tokens=24, eos_ids=frozenset([expected["eos_id"]]))
    assert generate_ids(model, expected["prompts"], decoding) == expected["continuations"]
    for prompt, continuation in zip(expected["prompts"], expected["continuations"], strict=True):
        assert generate_ids(model, [prompt], decoding) == [continuation]
    assert len({len(row) for row in expected["continuations"]}) > 1  # some stopped early


# A batch gives the same texts as its prompts alone.


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=40), SAMPLING])
def test_a_prompt_gets_the_same_text_in_a_batch_as_alone(toy, decoding):
    """The texts are equal although float32 rounds a batch differently, by about 1e-5: each greedy token leads the
    runner-up by at least 0.07, and no random number is within 8e-4 of a boundary between two tokens.
    """
    model, tok = toy
    assert len({len(ids) for ids in tok.encode_prompts(PROMPTS)}) > 3
    together = generate(*toy, PROMPTS, decoding)
    assert [generate(*toy, [prompt], decoding, keys=[key])[0] for key, prompt in enumerate(PROMPTS)] == together
    assert dict(generate_each(*toy, PROMPTS, decoding, batch_size=5)) == dict(enumerate(together))
    backwards = generate(*toy, PROMPTS[::-1], decoding, keys=range(len(PROMPTS))[::-1])
    assert backwards[::-1] == together


@torch.no_grad()
@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=40), SAMPLING])
def test_the_cache_changes_nothing(toy, decoding):
    model, tok = toy
    (text,) = generate(*toy, PROMPTS[:1], decoding, keys=[3])
    ids, rng = tok.encode(PROMPTS[0]), np.random.default_rng([decoding.seed, 3])
    start = len(ids)
    for _ in range(40):
        logits = model(torch.tensor([ids]))[:, -1]
        if decoding.temperature == 0:
            ids.append(logits.argmax().item())
        else:
            uniform = torch.tensor([rng.random()], dtype=torch.float64)
            ids.append(sample(logits, uniform, decoding.temperature, decoding.top_p).item())
        if ids[-1] == tok.eos_id:
            break
    assert tok.decode(ids[start:]) == text


def test_each_key_and_seed_draws_its_own_text(toy):
    texts = generate(*toy, [PROMPTS[0]] * 6, SAMPLING)
    assert len(set(texts)) > 3
    assert generate(*toy, [PROMPTS[0]] * 6, SAMPLING) == texts
    assert generate(*toy, [PROMPTS[0]] * 6, Decoding(40, 1.5, 0.9, seed=1)) != texts
    assert generate(*toy, [PROMPTS[0]], SAMPLING, keys=[4]) == texts[4:5]


@pytest.mark.parametrize("decoding", [Decoding(20, 2.0, top_p=1e-9), Decoding(20, temperature=1e-300)])
def test_a_tiny_nucleus_or_temperature_is_greedy(toy, decoding):
    assert generate(*toy, PROMPTS, decoding) == generate(*toy, PROMPTS, Decoding(20))


def test_no_prompts_give_no_texts(toy):
    assert generate(*toy, [], Decoding()) == [] and list(generate_each(*toy, [], Decoding(), batch_size=4)) == []


# Drawing.


def test_draws_follow_the_distribution():
    """Pearson's chi-square of 20,000 draws from 6 classes exceeds 20.5 once in 1,000 times; the seed is fixed."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -3.0])
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    counts = sample(logits.expand(20_000, -1), uniform, 0.7, 1.0).bincount(minlength=6)
    expected = 20_000 * (logits / 0.7).softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


@settings(deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=1, max_size=9),
    st.floats(0, 1, exclude_max=True, allow_subnormal=False),
    st.floats(0.01, 1),
    st.floats(0.1, 10),
)
def test_nothing_outside_the_nucleus_is_drawn(logits, uniform, top_p, temperature):
    logits = torch.tensor(logits)
    token = sample(logits[None], torch.tensor([uniform], dtype=torch.float64), temperature, top_p).item()
    p = (logits.double() / temperature).softmax(-1)
    likelier = p > p[token] * (1 + 1e-12)  # not by rounding alone
    assert p[likelier].sum() < top_p + 1e-12  # and does not suffice


def test_a_device_without_float64_draws_the_same_text(toy, monkeypatch):
    expected = generate(*toy, PROMPTS, SAMPLING)
    monkeypatch.setattr(decoder, "widest_float", lambda device: torch.float32)
    assert generate(*toy, PROMPTS, SAMPLING) == expected
    largest = SimpleNamespace(random=lambda: 1 - 2**-53)  # float32 would round it to 1, which lies after all tokens
    assert decoder.next_tokens(torch.zeros(1, 5), SAMPLING, [largest]).item() == 4


def test_float64_is_not_asked_of_a_device_without_it(monkeypatch):
    def refuse(*_, **__):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    assert decoder.widest_float(torch.device("cpu")) == torch.float64
    monkeypatch.setattr(torch, "zeros", refuse)
    assert decoder.widest_float(torch.device("mps")) == torch.float32


def test_every_token_of_the_nucleus_is_drawn():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    drawn = sample(p.log().expand(1000, -1), uniform, 1.0, 0.6).bincount(minlength=4) / 1000
    assert torch.allclose(drawn, torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=2e-3)


@pytest.mark.parametrize("spread", [0.1, 3.0, 9.0])  # nuclei of 17,000, 1,500 and a few tokens
def test_the_nucleus_is_the_smallest_set_that_suffices(spread):
    p = (spread * torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))).double().softmax(-1)
    for row, least in zip(p, least_likely(p, 0.9), strict=True):
        assert row[row > least].sum() < 0.9 <= row[row >= least].sum()


# Where a text ends.


@pytest.mark.parametrize("count", [1, 3])
def test_generation_stops_at_the_limit(toy, count):
    model, tok = toy
    (text,) = generate(*toy, PROMPTS[:1], Decoding(count))
    assert len(tok.encode_responses([text])[0]) == count


@pytest.mark.parametrize(("prompt_tokens", "generated"), [(10, 5), (38, 2), (39, 1)])
def test_generation_ends_at_the_last_position(gpt2, prompt_tokens, generated):
    (ids,) = generate(gpt2, tokenizer([5] * prompt_tokens), ["a prompt"], Decoding(5))
    assert len(ids) == generated


def test_a_short_prompt_continues_after_a_long_one_reached_the_last_position(gpt2):
    prompts = [[5] * 39, [6, 9, 12], list(range(20))]
    together = generate(gpt2, tokenizer(*prompts), [""] * 3, Decoding(100))
    assert [len(prompt) + len(ids) for prompt, ids in zip(prompts, together, strict=True)] == [40, 40, 40]
    assert together == [generate(gpt2, tokenizer(prompt), [""], Decoding(100))[0] for prompt in prompts]


def test_eos_at_once_is_an_empty_text(gpt2):
    prompt = [3, 4, 5]
    ((first, *_),) = generate_ids(gpt2, [prompt], Decoding(3))
    assert generate(gpt2, tokenizer(prompt, eos_id=first), [""], Decoding(3)) == [[]]


@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        ([5] * 40, ["prompt 2", "40 tokens", "40 positions", "shorten"]),
        ([5] * 500, ["prompt 2", "500 tokens", "40 positions"]),
        ([], ["prompt 2", "no tokens"]),
        ([5, 61], ["prompt 2", "token 61", "61 tokens", "give the model its own tokenizer"]),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused_before_the_first_token(gpt2, refuses, ids, parts):
    for refused in (
        lambda: generate(gpt2, tokenizer([5], ids), ["", ""], Decoding(5)),
        lambda: next(generate_each(gpt2, tokenizer([5], ids), ["", ""], Decoding(5), batch_size=1)),
    ):
        refuses(refused, *parts)


@pytest.mark.parametrize("prompt", [[], [5] * 40])
def test_a_prompt_without_tokens_or_room_for_one_is_refused(gpt2, prompt):
    with pytest.raises(ValueError, match="must have 1 to 39"):
        generate_ids(gpt2, [[5, 6], prompt], Decoding(2))


# Stop strings.


def byte_tokenizer(*extra):
    """Byte-level BPE with a token for each byte and some longer ones, which may start or end inside a character."""
    alphabet = list(dict.fromkeys(encode_bytes(bytes([byte])) for byte in range(256)))
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *map(encode_bytes, extra)])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {}, Path("here"))


def encode_bytes(raw):
    """Return the printable spelling that byte-level BPE gives to bytes (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte if byte in printable else 256 + others.index(byte)) for byte in raw)


def fallback_tokenizer(*words):
    """Like LLaMA 2's tokenizer: pieces with ▁ for a space, and bytes for all other text."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, {}, Path("here"))


def pieces_of(tok, raw, cuts):
    """ids of a text's bytes, cut at `cuts` where the vocabulary has the pieces."""
    ids, start = [], 0
    for end in [*cuts, len(raw)]:
        whole = tok.backend.token_to_id(encode_bytes(raw[start:end]))
        single = [tok.backend.token_to_id(encode_bytes(raw[i : i + 1])) for i in range(start, end)]
        ids += single if whole is None else [whole]
        start = end
    return ids


def stopped_after(tok, ids, stop):
    """Return the number of tokens after which the stop string was detected, or None."""
    watch = StopWatch(tok, stop, prompt=[])
    return next((n for n in range(1, len(ids) + 1) if watch.has_stopped(ids[:n])), None)


@pytest.mark.parametrize(
    ("text", "extra", "cuts", "stop", "expected"),
    [
        ("one two three", [], [], (" two",), "one"),  # over token boundaries
        ("one two three", [b"ne tw"], [1, 6], (" two",), "one"),  # starts inside a token
        ("one two three", [b" two thr"], [3, 11], ("two",), "one "),  # ends inside it, too
        ("né 🤖 ok", ["é 🤖".encode()[:5]], [1, 6], ("🤖",), "né "),  # a character over tokens
        ("né 🤖 ok", ["é 🤖".encode()[1:5]], [2, 6], ("🤖 ",), "né "),
        ("日本語 日本", [], [], ("語 日",), "日本"),
        ("🤖🤖a", ["🤖🤖".encode()[2:5]], [2, 5], ("🤖a",), "🤖"),  # a token ends one character and begins the next
        ("🤖🤖👍🤖", [], [], ("👍",), "🤖🤖"),
        ("a\n\nb", [b"\n\n"], [1, 3], ("\n",), "a"),
        ("abcabd", [], [], ("abd", "zz"), "abc"),
        ("x END y STOP", [], [], ("STOP", "END"), "x "),  # the first in the text, not in the list
        ("END", [], [], ("END",), ""),
        ("no such thing", [], [], ("END",), "no such thing"),
        ("aaaaab", [], [], ("aab",), "aaa"),
        ("\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd stop", [], [], ("stop",), "\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd "),
    ],
)
def test_a_stop_string_is_detected_with_its_last_token(text, extra, cuts, stop, expected):
    tok = byte_tokenizer(*extra)
    ids = pieces_of(tok, text.encode(), cuts)
    assert tok.decode(ids) == text and before_stop(text, stop) == expected
    first = next((n for n in range(len(ids) + 1) if any(end in tok.decode(ids[:n]) for end in stop)), None)
    assert stopped_after(tok, ids, stop) == first


SOME = "a b日🤖é\nb🤖🤖 日é日\n\nab".encode()
BYTES = byte_tokenizer(*{SOME[start : start + size] for start in range(len(SOME)) for size in (2, 3, 5)})


@settings(deadline=None, max_examples=200)
@given(
    st.text("ab 日🤖é\n", max_size=30), st.lists(st.text("ab 日🤖é\n", min_size=1, max_size=4), min_size=1), st.data()
)
@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_a_stop_string_is_detected_whatever_the_tokens(kind, text, stop, data):
    if kind == "bytes":
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text.encode()) - 1)))))
        tok = BYTES
        ids = pieces_of(tok, text.encode(), cuts) if text else []
    else:
        tok = fallback_tokenizer("▁", "a", "b", "▁a", "ab", "▁b", "\n")
        known = {"a": "a", "b": "b", " ": "▁", "\n": "\n"}
        names = [[known[c]] if c in known else [f"<0x{byte:02X}>" for byte in c.encode()] for c in text]
        ids = [tok.backend.token_to_id(name) for name in sum(names, [])]
    first = next((n for n in range(len(ids) + 1) if any(end in tok.decode(ids[:n]) for end in stop)), None)
    assert stopped_after(tok, ids, tuple(stop)) == first


def test_only_the_last_tokens_are_decoded(toy):
    sizes, tok, counting = [], byte_tokenizer(), byte_tokenizer()
    counting.decode = lambda ids: sizes.append(len(ids)) or tok.decode(ids)
    ids = pieces_of(tok, "né 🤖 日本語 and so on, for a long while".encode(), [])
    assert stopped_after(counting, ids, ("zzz",)) is None
    assert len(sizes) == 2 * len(ids) and max(sizes) <= 8


def test_a_stop_string_may_begin_with_the_space_after_the_prompt():
    tok = fallback_tokenizer("▁a", "b", "\n")
    prompt, ids = ([tok.backend.token_to_id(piece) for piece in pieces] for pieces in (["▁a", "\n"], ["▁a", "b"]))
    watch = StopWatch(tok, (" a",), prompt)
    assert tok.decode(ids) == "ab" and watch.has_stopped(ids[:1])


def test_texts_end_before_a_stop_string(toy):
    whole = generate(*toy, PROMPTS, Decoding(40))
    stop = ("\n#", "= 1")
    texts = generate(*toy, PROMPTS, Decoding(40, stop=stop))
    assert texts == [before_stop(text, stop) for text in whole] and texts != whole


def test_a_stop_string_ends_the_loop(toy, monkeypatch):
    calls = []
    monkeypatch.setattr(decoder, "next_tokens", lambda *args, old=decoder.next_tokens: calls.append(1) or old(*args))
    generate(*toy, PROMPTS, Decoding(400, stop=("\n",)))
    assert len(calls) < 60


# The cache, and the model's mode.


def test_the_cache_keeps_its_memory_from_the_first_token_to_the_last(toy, monkeypatch):
    seen, old = [], KVCache.extend

    def extend(self, layer, k, v):
        views = old(self, layer, k, v)
        if layer == 0:
            seen.append((self, [view.data_ptr() for view in views], views[0].shape[2]))
        return views

    monkeypatch.setattr(KVCache, "extend", extend)
    generate(*toy, PROMPTS[:3], Decoding(12))
    caches, pointers, filled = zip(*seen, strict=True)
    assert len(set(map(id, caches))) == 1 and all(pointer == pointers[0] for pointer in pointers)
    assert filled == tuple(range(filled[0], filled[0] + len(seen)))  # attention reads only the filled positions


def test_each_module_gets_its_mode_back(gpt2):
    decoding, batch = Decoding(5), [[3, 4, 5]]
    expected = generate_ids(gpt2, batch, decoding)
    try:
        gpt2.train()
        gpt2.transformer.h[0].eval()
        modes = [module.training for module in gpt2.modules()]
        assert generate_ids(gpt2, batch, decoding) == expected  # without dropout
        assert [module.training for module in gpt2.modules()] == modes
        with pytest.raises(ZeroDivisionError):
            generate_ids(gpt2, batch, decoding, watches=[SimpleNamespace(has_stopped=lambda ids: 1 / 0)])
        assert [module.training for module in gpt2.modules()] == modes
    finally:
        gpt2.eval()


def test_an_adapted_model_generates_without_gradients(toy, monkeypatch):
    model = mb.adapt(mb.load_model(MODEL), rank=2)
    seen, hidden = set(), model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a, **k: seen.add(torch.is_grad_enabled()) or hidden(*a, **k))
    assert generate(model, toy[1], PROMPTS[:2], Decoding(9)) == generate(*toy, PROMPTS[:2], Decoding(9))
    assert seen == {False}


def test_progress_counts_tokens_and_rows(gpt2):
    told = []
    prompts = [[5] * 39, [5, 6], [7]]
    rows = generate_ids(gpt2, prompts, Decoding(6), progress=lambda tokens, ended: told.append((tokens, ended)))
    assert sum(tokens for tokens, _ in told) == sum(map(len, rows)) and told[0] == (3, 1) and told[-1] == (2, 2)


def test_the_bar_shows_prompts_and_tokens_per_second(toy, capsys):
    list(generate_each(*toy, PROMPTS, Decoding(80), batch_size=1, desc="asking"))
    shown = capsys.readouterr().err
    assert "asking: 12 of 12, " in shown and "tokens/s" in shown  # not a terminal: a line at the end


# The command line.

ASK = "Ada has 3 bags with 4 apples each. How many apples does Ada have?"


@pytest.fixture
def command(in_command, monkeypatch):
    """command(*flags, stdin=b"") -> status, standard output, standard error of the program, run in this process."""

    def run(*flags, stdin=None):
        stream = io.TextIOWrapper(io.BytesIO(stdin or b""))
        stream.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", stream)
        return in_command(program.main, "--device", "cpu", *flags)

    return run


def test_a_prompt_is_answered_on_standard_output_and_nothing_else_is_there(toy, command):
    expected = generate(*toy, [PROMPT.format(instruction=ASK), PROMPT.format(instruction="Hi")], Decoding(30))
    assert command("--prompt", ASK, "--max-new-tokens", "30")[:2] == (0, f"{expected[0]}\n")
    status, out, _ = command("--prompt", ASK, "--prompt", "Hi", "--max-new-tokens", "30")
    answers = [json.loads(line) for line in out.splitlines()]  # so that it is clear where an answer ends
    assert status == 0 and [answer["completion"] for answer in answers] == expected


def test_raw_asks_without_the_template(toy, command):
    expected = generate(*toy, [ASK], Decoding(9))
    assert command("--prompt", ASK, "--raw", "--max-new-tokens", "9")[:2] == (0, expected[0] + "\n")


LINES = [
    ASK.encode(),
    b"",
    "Zoë: 🤖 {x}?".encode(),
    b'{"prompt": "two\\nlines"}',
    b'{"instruction": "Add.", "input": "3 and 4", "output": "7"}',
    b"  { not JSON, for it does not begin the line",
    b"{x} is text",
    b' { "query": "q" } ',
]
ASKED = [ASK, "Zoë: 🤖 {x}?", "two\nlines", "Add.", "  { not JSON, for it does not begin the line", "{x} is text"]
ASKED += [' { "query": "q" } ']


@pytest.mark.parametrize("source", ["file", "-", "nothing"])
def test_a_file_is_answered_in_its_order(toy, command, tmp_path, source):
    content = b"\xef\xbb\xbf" + b"\r\n".join(LINES) + b"\n"
    file = tmp_path / "prompts"
    file.write_bytes(content)
    flags = {"file": ["--file", str(file)], "-": ["--file", "-"], "nothing": []}[source]
    flags += ["--max-new-tokens", "8", "--batch-size", "2"]
    status, out, _ = command(*flags, stdin=None if source == "file" else content)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [answer["prompt"] for answer in answers] == ASKED
    prompts = [PROMPT.format(instruction=text) for text in ASKED]
    prompts[3] = PROMPT_WITH_INPUT.format(instruction="Add.", input="3 and 4")
    assert [answer["completion"] for answer in answers] == generate(*toy, prompts, Decoding(8))


def test_an_object_may_have_several_lines_if_it_is_the_whole_file(command):
    status, out, _ = command("--max-new-tokens", "2", stdin=b'\xef\xbb\xbf{\r\n  "prompt": "a"\r\n}\r\n')
    assert status == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["a"]


def test_flags_reach_the_decoding(toy, command):
    flags = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "7", "--stop", "\n", "4", "--max-new-tokens", "30"]
    expected = generate(*toy, [PROMPT.format(instruction=ASK)], Decoding(30, 1.5, 0.9, ("\n", "4"), 7))
    assert command("--prompt", ASK, *flags)[1] == expected[0] + "\n"


def test_an_adapter_answers(toy, command, tmp_path):
    torch.manual_seed(0)
    model = mb.adapt(mb.load_model(MODEL), rank=2, init="lora", targets="down_proj")
    for _, layer in mb.lowrank.adapted_layers(model):
        nn.init.normal_(layer.B, std=5)
    mb.save_adapter(model, tmp_path)
    expected = generate(model, toy[1], [PROMPT.format(instruction=ASK)], Decoding(20))
    assert expected != generate(*toy, [PROMPT.format(instruction=ASK)], Decoding(20))
    status, out, _ = command("--adapter", str(tmp_path), "--prompt", ASK, "--max-new-tokens", "20")
    assert (status, out) == (0, expected[0] + "\n")


@pytest.mark.parametrize(
    ("flags", "stdin", "parts"),
    [
        ([], None, ["nothing to answer", "--prompt"]),
        ([], b"", ["standard input", "no prompts"]),
        (["--file", "-"], b"\n \n", ["standard input", "no prompts"]),
        ([], b"good\n\xff\n", ["standard input, line 2", "UTF-8"]),
        ([], b'good\n{"prompt": ', ["standard input, line 2", "broken JSON"]),
        ([], b'{"prompt": true}', ["line 1", "'prompt'", "bool"]),
        ([], b'{"text": "q"}', ["line 1", "text", "query, instruction", "prompt"]),
        ([], b'{"prompt": "\\ud800"}', ["line 1", "half of a character"]),
        ([], b'{"a":' * 100_000, ["line 1", "broken JSON"]),
        (["--prompt", "\udcff"], None, ["--prompt", "half of a character"]),
        (["--file", "absent"], None, ["absent", "no such file"]),
        (["--file", "."], None, ["directory"]),
        (["--prompt", "a", "--file", "b"], None, ["--prompt and --file"]),
        (["--prompt", "a", "--top-p", "0.5"], None, ["--top-p", "--temperature"]),
        (["--prompt", "a", "--seed", "7"], None, ["--seed has no meaning without --temperature"]),
        (["--prompt", "a", "--temperature", "1", "--top-p", "0"], None, ["--top-p", "'0'", "above 0"]),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], None, ["--top-p", "1.5"]),
        *[
            (["--prompt", "a", "--temperature", value], None, ["--temperature", value])
            for value in ("-1", "nan", "inf")
        ],
        (["--file", "-"], b'[{"prompt": "a"}]', ["standard input, line 1", "JSON list"]),
        (["--file", "-"], b'[\n  {\n    "prompt": "a"\n  }\n]\n', ["standard input, line 1", "JSON list"]),
        (["--prompt", "a", "--stop", ""], None, ["--stop", "empty"]),
        (["--prompt", "a", "--max-new-tokens", "0"], None, ["--max-new-tokens"]),
        (["--prompt", "a", "--batch-size", "0"], None, ["--batch-size"]),
        (["--prompt", "a", "--model", "absent"], None, ["absent", "no such folder"]),
        (["--prompt", "a", "--model", str(MODEL.with_name("bert"))], None, ["bert"]),
        (["--prompt", "a", "--adapter", "absent"], None, ["absent"]),
        (["--prompt", "a", "--device", "tpu"], None, ["--device tpu"]),
        (["--prompt", "a b " * 1000], None, ["--prompt has", "512 positions"]),
        (["a"], None, ["--help"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, flags, stdin, parts):
    status, out, err = command(*flags, stdin=stdin)
    err = err.rpartition("\r")[2]  # a bar that was there before
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("error: "), err
    for part in parts:
        assert part in err


def run_module(*flags, **settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "minibalora", "generate", "--device", "cpu", *flags]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


def test_as_a_module_with_prompts_from_a_pipe(toy):
    program = run_module("--max-new-tokens", "9", stdin=subprocess.PIPE)
    out, err = program.communicate(f"{ASK}\nsecond\n".encode())
    answers = [json.loads(line) for line in out.decode().splitlines()]
    assert program.returncode == 0 and b"tokens/s" in err
    expected = generate(*toy, [PROMPT.format(instruction=text) for text in (ASK, "second")], Decoding(9))
    assert answers == [
        {"prompt": text, "completion": completion} for text, completion in zip((ASK, "second"), expected, strict=True)
    ]


def test_a_closed_pipe_ends_the_command_quietly(tmp_path):
    file = tmp_path / "prompts"
    file.write_text("".join(f"prompt {number}\n" for number in range(40)))
    program = run_module("--file", str(file), "--max-new-tokens", "2", "--batch-size", "1")
    program.stdout.readline()
    program.stdout.close()
    err = program.stderr.read().decode()
    assert program.wait() in (0, 141) and "Traceback" not in err and "rror" not in err
