"""Tests of T5 against transformers' values in tests/golden/, and of packing, cache, files, tokenizer and scripts."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, distance, golden_example, headless, stretch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import minibalora as mb
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.tokenizer import load_tokenizer
from minibalora.data.batches import Row, encode_examples, pack
from minibalora.data.prompts import example_from
from minibalora.evaluation import classify, evaluate, generate
from minibalora.models.t5 import bucket, t5
from minibalora.run.hardware import checkpoint_blocks
from minibalora.toy.problems import clean_problems

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_nlg  # noqa: E402
import train_nlu  # noqa: E402

MODELS = ["t5", "t5_gated"]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (B, T), padded on the right with a token of the vocabulary, and their mask (B, T)."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    return ids, (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()


def random_texts(*lengths: int) -> list[list[int]]:
    return [torch.randint(61, (length,)).tolist() for length in lengths]


# Against transformers.


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    *inputs, expected = golden_example(name)
    logits = mb.load_model(GOLDEN / name)(*inputs)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()  # 1e-4 is required; measured 5e-7


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_stays_near_float32(name):
    *inputs, expected = golden_example(name)
    logits = mb.load_model(GOLDEN / name, dtype=torch.bfloat16)(*inputs).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()  # each rounding: 0.4 %; 4 or 5 blocks


@pytest.mark.parametrize("name", MODELS)
def test_buckets_of_distances_equal_those_of_transformers(name):
    """Check the distances −300 to 300 for 32 buckets and for 8."""
    expected, config = load_file(GOLDEN / name / "expected.safetensors"), read_config(GOLDEN / name)
    distances = torch.arange(-300, 301)
    for key, is_bidirectional in (("encoder_buckets", True), ("decoder_buckets", False)):
        sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
        assert torch.equal(bucket(distances, is_bidirectional, *sizes), expected[key])


# Padding, packing and cache.


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_and_later_tokens_do_not_change_logits(name):
    ids, mask, answers, _ = golden_example(name)
    model = mb.load_model(GOLDEN / name)
    other = torch.where(mask.bool(), ids, 7)
    logits = model(ids, mask, answers)
    assert torch.allclose(model(other, mask, answers), logits, atol=1e-5)
    assert torch.allclose(model(ids[1:2, :9], None, answers[1:2, :4])[0], logits[1, :4], atol=1e-5)


def test_left_padding_is_refused():
    ids, mask, answers, _ = golden_example("t5")
    with pytest.raises(ValueError, match="right padding only"):
        mb.load_model(GOLDEN / "t5")(ids, mask.flip(1), answers)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [0, 1, 6])
def test_packed_rows_equal_rows_alone_in_value_and_gradient(name, shared):
    """One row has a prompt of only one token after the shared ones, and one row has an answer of one token."""
    torch.manual_seed(shared)
    model = mb.adapt(mb.load_model(GOLDEN / name), rank=4)
    stretch(model)
    (common,), prompts, answers = random_texts(shared), random_texts(9, 1, 30), random_texts(4, 6, 1)
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.tensor([*common, *sum(rows, [])])
    packed = model.packed(ids, list(map(len, rows)), list(map(len, answers)), shared)
    alone = [
        model.hidden(torch.tensor([common + prompt]), None, torch.tensor([[0, *answer[:-1]]]))[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    alone = torch.cat(alone)
    assert packed.shape == alone.shape and distance(packed, alone) < 1e-6
    upstream, trained = torch.randn_like(alone), [p for p in model.parameters() if p.requires_grad]
    gradients, expected = (torch.autograd.grad((states * upstream).sum(), trained) for states in (packed, alone))
    for a, b in zip(gradients, expected, strict=True):
        assert distance(a, b) < 1e-4


def test_rows_from_pack_give_the_states_that_predict_each_response_token():
    """`packed` on a batch from `pack` equals `hidden` on whole prompts and shifted answers."""
    model = mb.load_model(GOLDEN / "t5_gated")
    prompts, answers = [[5, *text, 1] for text in random_texts(3, 8)], random_texts(4, 2)
    rows = [Row(torch.tensor(p + a).int().numpy(), len(p), 1) for p, a in zip(prompts, answers, strict=True)]
    batch = pack(rows, "cpu")
    assert batch.shared >= 1
    with torch.no_grad():
        states = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)
        inputs = torch.tensor([[0, *answer][:-1] + [0] * (4 - len(answer)) for answer in answers])
        hidden = model.hidden(*padded(prompts), inputs)
    assert torch.allclose(states, torch.cat([hidden[0], hidden[1, :2]]), atol=1e-5)
    assert batch.targets.tolist() == sum(answers, [])


def test_all_parameters_get_gradients_with_and_without_checkpointing():
    """This includes the biases of the distances, which the first block holds for all blocks."""
    gradients = []
    for is_checkpointed in (False, True):
        model = mb.load_model(GOLDEN / "t5_gated")
        if is_checkpointed:
            checkpoint_blocks(model)
        torch.manual_seed(0)
        model.packed(torch.randint(61, (30,)), [20, 10], [5, 3]).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    assert {name for name, gradient in plain.items() if gradient is None} == {"lm_head.weight"}
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain.keys() - {"lm_head.weight"})


def test_packed_rows_do_not_see_each_other():
    model = mb.load_model(GOLDEN / "t5")
    ids = torch.randint(61, (20,))
    other = torch.cat([ids[:12], (ids[12:] + 1) % 61])
    first, second = (model.packed(tokens, [9, 8], [4, 8], shared=3) for tokens in (ids, other))
    assert torch.equal(first[:4], second[:4]) and not torch.allclose(first[4:], second[4:])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_states_with_a_cache_equal_states_without(name):
    """Compare prompts of 17, 9 and 1 tokens plus six answer tokens each with one pass over each whole row."""
    model, answers = mb.load_model(GOLDEN / name), torch.randint(61, (3, 6))
    prompts = random_texts(17, 9, 1)
    ids, _ = padded(prompts)
    cache, first = model.prefill(ids, [17, 9, 1], room=7)
    steps = torch.stack([first, *(model.decode(tokens, cache) for tokens in answers.T)], dim=1)
    for prompt, answer, states in zip(prompts, answers, steps, strict=True):
        whole = model.hidden(torch.tensor([prompt]), None, torch.cat([torch.tensor([0]), answer])[None])[0]
        assert torch.allclose(states, whole, atol=1e-5)


@torch.no_grad()
def test_head_weight_times_hidden_equals_the_logits():
    """v1.0 divides states by √d before its tied head; `hidden` includes this factor."""
    for name in MODELS:
        *inputs, _ = golden_example(name)
        model = mb.load_model(GOLDEN / name)
        assert torch.allclose(model.hidden(*inputs) @ model.head_weight.T, model(*inputs), atol=1e-5)


# Teacher and dropout.


@pytest.mark.parametrize("init", ["pissa", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_the_teacher_is_the_pretrained_model(name, init):
    batch = torch.randint(61, (30,)), [20, 10], [5, 3]
    with torch.no_grad():
        before = mb.load_model(GOLDEN / name).packed(*batch)
    model = mb.adapt(mb.load_model(GOLDEN / name), rank=2, init=init).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.packed(*batch).square().sum().backward()
    optimizer.step()
    with mb.pretrained(model):
        assert torch.equal(model.packed(*batch), before)
    assert model.training and distance(model.packed(*batch), before) > 0.01


@torch.no_grad()
def test_dropout_is_in_training_only():
    *inputs, expected = golden_example("t5_gated")
    model = mb.load_model(GOLDEN / "t5_gated").train()
    first, second = model(*inputs), model(*inputs)
    assert not torch.allclose(first, expected, atol=1e-2) and not torch.equal(first, second)


# Files.


def copy_of(name: str, folder, tensors=None, **config):
    """Copy a golden checkpoint, add tensors, and change keys of its config.json; None removes a key."""
    settings = json.loads((GOLDEN / name / "config.json").read_text()) | config
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: value for k, value in settings.items() if value is not None}))
    save_file(load_file(GOLDEN / name / "model.safetensors") | (tensors or {}), folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_the_old_spelling_of_an_untied_head_is_read(tmp_path):
    """Published files set tie_word_embeddings. transformers 5 writes it always true, and adds scale_decoder_outputs."""
    *inputs, expected = golden_example("t5_gated")
    folder = copy_of("t5_gated", tmp_path, tie_word_embeddings=False, scale_decoder_outputs=None)
    assert (mb.load_model(folder)(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_equal_copies_of_the_embedding_are_ignored_and_others_are_refused(tmp_path, refuses):
    *inputs, expected = golden_example("t5")
    shared = load_file(GOLDEN / "t5" / "model.safetensors")["shared.weight"]
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 3)}
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    folder = copy_of("t5", tmp_path, unused | {name: shared.clone() for name in names})
    assert (mb.load_model(folder)(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert mb.load_model(folder, "classifier", 2).checkpoint.new_modules == ["classification_head"]
    for name in names:
        copy_of("t5", tmp_path, {name: shared + 1})
        refuses(lambda: mb.load_model(tmp_path), name, "differs from the embedding")  # noqa: B023
    mb.load_model(tmp_path, "classifier", 2)  # a classifier does not read the language-model head
    copy_of("t5", tmp_path, {names[0]: shared + 1})
    refuses(lambda: mb.load_model(tmp_path, "classifier", 2), names[0], "differs from the embedding")


def test_the_embedding_is_read_from_the_name_of_a_copy(tmp_path):
    """Some programs store equal tensors only once."""
    *inputs, expected = golden_example("t5")
    tensors = load_file(GOLDEN / "t5" / "model.safetensors")
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, copy_of("t5", tmp_path) / "model.safetensors")
    assert (mb.load_model(tmp_path)(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("changes", "words"), [
    ({"feed_forward_proj": "gated-silu"}, ["activation", "gated-silu", "gated-gelu"]),
    ({"is_decoder": True}, ["is_decoder"]),
    ({"is_encoder_decoder": False}, ["is_encoder_decoder"]),
    ({"relative_attention_num_buckets": 2}, ["2 buckets"]),
    ({"relative_attention_max_distance": 16, "relative_attention_num_buckets": 32}, ["distances up to 16"]),
    ({"decoder_start_token_id": None}, ["decoder_start_token_id", "missing"]),
    ({"decoder_start_token_id": 61}, ["decoder_start_token_id is 61", "vocab_size 61"]),
    ({"d_kv": 9}, ["shape"]),
    ({"num_decoder_layers": 1 << 19}, ["hidden layers"]),
    ({"num_decoder_layers": 3}, ["lacks decoder.block.2"]),
])  # fmt: skip
def test_settings_that_are_not_implemented_or_do_not_fit_are_refused_by_name(changes, words, tmp_path, refuses):
    refuses(lambda: mb.load_model(copy_of("t5", tmp_path, **changes)), *words)


@torch.no_grad()
def test_a_new_head_is_drawn_as_in_transformers(tmp_path):
    """Weights have a standard deviation of d^-1/2; biases are 0."""
    torch.manual_seed(0)
    model = mb.load_model(headless("t5_classifier", tmp_path), "classifier", 5)
    dense = model.classification_head.dense
    assert dense.weight.std().item() == pytest.approx(24**-0.5, rel=0.1) and not dense.bias.any()


# Tokenizer.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny random T5 v1.1 whose tokenizer adds no BOS and ends each text with </s>."""
    folder = tmp_path_factory.mktemp("t5") / "model"
    folder.mkdir()
    examples = [example_from(row, line) for line, row in enumerate(clean_problems(200, seed=1))]
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>")
    tok.train_from_iterator((f"{example.prompt} {example.response}" for example in examples), trainer)
    tok.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tok.save(str(folder / "tokenizer.json"))
    config = json.loads((GOLDEN / "t5_gated" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": tok.get_vocab_size() + 3}))
    torch.manual_seed(0)
    save_file(t5(read_config(folder)).state_dict(), folder / "model.safetensors")
    return folder


def test_prompts_and_responses_end_with_eos(folder):
    tok = load_tokenizer(folder)
    example = example_from({"query": "What is 3 plus 4?", "response": "It is 7."}, 1)
    (row,), _, _ = encode_examples([example], tok, 500)
    assert (
        tok.encode_prompts([example.prompt]) == [tok.encode(example.prompt)] == [row.ids[: row.prompt_length].tolist()]
    )
    assert row.ids[row.prompt_length - 1] == row.ids[-1] == tok.eos_id == 1


def test_an_answer_is_decoded_without_a_space_at_its_start(folder):
    """The answer is a text by itself, not a continuation of the prompt."""
    tok = load_tokenizer(folder)
    (prompt,), (answer,) = tok.encode_prompts(["How many apples?"]), tok.encode_responses(["7 apples."])
    assert tok.decode_after(prompt, answer) == "7 apples."


def test_a_tokenizer_without_eos_at_the_end_is_refused(folder, tmp_path, refuses):
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.post_processor = processors.TemplateProcessing("$A", "$A $B", [])
    tok.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    refuses(lambda: load_tokenizer(tmp_path), "tokenizer.json", "EOS")


# Scripts.


@pytest.fixture
def run(folder, tmp_path, monkeypatch, in_command):
    """Return run(main, *flags): it runs a program on the tiny model and returns its status, stdout and stderr."""
    problems = "\n".join(json.dumps(row) for row in clean_problems(12, seed=2))
    (tmp_path / "problems.jsonl").write_text(problems)
    texts = (json.dumps({"text": f"Ann has {number} apples.", "label": "ab"[number % 2]}) for number in range(12))
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    monkeypatch.chdir(tmp_path)

    return lambda main, *flags: in_command(main, "--model", folder, *flags)


NLG = "--data problems.jsonl --max-steps 2 --batch-size 4 --micro-batch-size 2 --device cpu".split()


def test_train_nlg_and_generate_run_on_a_t5(run):
    """The losses in the table come from `packed`, the exact match comes from the cache."""
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clean_problems(2, seed=3)))
    status, out, _ = run(train_nlg.main, *NLG, "--rank", "4", "--eval", "held_out.jsonl", "--out", "tuned")
    assert status == 0 and "loss on held-out responses" in out and "exact match, all (2)" in out
    assert json.loads(Path("tuned/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    flags = ["--adapter", "tuned", "--prompt", "What is 3 plus 4?", "--max-new-tokens", "5", "--device", "cpu"]
    status, text, _ = run(generate.main, *flags)
    assert status == 0 and text.strip()


def test_grad_checkpoint_and_teacher_cache_do_not_change_losses(run):
    logs = []
    for index, flags in enumerate(([], ["--grad-checkpoint"], *2 * [["--teacher-cache", "cache"]])):
        assert run(train_nlg.main, *NLG, "--rank", "4", *flags, "--out", f"run{index}")[0] == 0
        lines = Path(f"run{index}/log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert logs[1:] == [pytest.approx(logs[0], rel=1e-5)] * 3


@pytest.mark.parametrize("flags", [["--quantize", "nf4", "--rank", "4"], ["--method", "full"]])
def test_nf4_and_full_training_run_on_a_t5(run, flags):
    assert run(train_nlg.main, *NLG, *flags, "--out", "tuned")[0] == 0


def check_labels(run, method):
    """Check that the command classify labels texts.jsonl as well as report.json says."""
    saved = ["--model", "tuned/model"] if method == "full" else ["--adapter", "tuned"]
    status, out, error = run(classify.main, *saved, "--data", "texts.jsonl", "--device", "cpu")
    assert status == 0, error
    gold = [json.loads(line)["label"] for line in Path("texts.jsonl").read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in out.splitlines()]
    accuracy = sum(map(str.__eq__, labels, gold)) / len(gold)
    assert accuracy == pytest.approx(
        json.loads(Path("tuned/report.json").read_text())["after"]["texts.jsonl"]["accuracy"]
    )


@pytest.mark.parametrize("method", ["ba-lora", "full"])
def test_train_nlu_runs_on_a_t5(run, method):
    data = ["--data", "texts.jsonl", "--eval", "texts.jsonl", "--task", "custom", "--text-field", "text"]
    flags = ["--label-field", "label", "--epochs", "1", "--method", method, "--device", "cpu", "--features", "states"]
    status, out, _ = run(train_nlu.main, *data, *flags, "--out", "tuned")
    assert status == 0 and "no classification_head in the checkpoint" in out
    assert load_file("states")["after"].shape == (12, 24)
    check_labels(run, method)


@pytest.mark.parametrize("method", ["ba-lora", "full"])
def test_as_text_classifies_by_the_logits_of_the_classes_words(run, method):
    """There is no new head: the adapter is a language model's and has only A and B."""
    words = ("The", "answer")  # both are single tokens
    rows = (json.dumps({"text": f"Ann has {number} apples.", "label": words[number % 2]}) for number in range(12))
    Path("texts.jsonl").write_text("\n".join(rows))
    data = ["--data", "texts.jsonl", "--eval", "texts.jsonl", "--task", "custom", "--text-field", "text", "--as-text"]
    flags = ["--label-field", "label", "--epochs", "1", "--method", method, "--device", "cpu", "--features", "states"]
    status, out, _ = run(train_nlu.main, *data, *flags, "--out", "tuned")
    assert status == 0 and "asked as 'custom sentence: Ann has 0 apples.', answered The or answer" in out
    if method == "ba-lora":
        config = json.loads(Path("tuned/adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_2_SEQ_LM" and config["modules_to_save"] is None
    check_labels(run, method)


def test_evaluating_the_loss_of_a_text_is_refused_for_a_t5(run):
    status, _, error = run(evaluate.main, "--task", "text", "--data", "problems.jsonl", "--out", "out")
    assert status == 2 and "--task text" in error and "is a T5" in error and len(error.splitlines()) == 1
