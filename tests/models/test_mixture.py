"""Tests of mixtures of experts: routing, adapting, gradients, load balance, adapter files and runs."""

import dataclasses
import json
import shutil
import sys

import deepseek_reference
import pytest
import torch
from helpers import GOLDEN, distance, golden_example, gradients_of_a_step, random_rows, stretch, with_toy_tokenizer
from safetensors.torch import load_file, save_file

import minibalora as mb
from minibalora.checkpoints.families import read_config
from minibalora.evaluation.decoding import Decoding, generate_ids
from minibalora.lowrank import adapted_layers
from minibalora.models.mixture import Mixture, Router, balance, keep_router_outputs, load_balance, routers_of
from minibalora.objective import NLG_RECIPES
from minibalora.run.hardware import checkpoint_blocks, compile_blocks
from minibalora.run.plan import nlg_formula

import train_nlg  # isort: skip  # test_train_nlg has put it on the path

NAMES = ["mixtral", "mixtral_window", "deepseek", "deepseek_norm"]
BALANCED = dataclasses.replace(NLG_RECIPES["iclr2026"], router_aux=0.7)


def mixtures(model) -> list[Mixture]:
    return [module for module in model.modules() if isinstance(module, Mixture)]


def mixture(name: str, **adapting) -> Mixture:
    """Return the last mixture of a golden model; with `adapting`, of the adapted model."""
    model = mb.load_model(GOLDEN / name)
    return mixtures(mb.adapt(model, **adapting) if adapting else model)[-1]


# Routing.


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_mixture_is_the_weighted_sum_of_all_experts(name):
    """Experts that are not chosen have weight 0."""
    module, x = mixture(name), torch.randn(3, 7, 24)
    p = (x @ module.gate.weight.T).softmax(-1)
    largest = p.topk(module.gate.top_k).values
    p = p.masked_fill(p < largest[..., -1:], 0)
    p = p / largest.sum(-1, keepdim=True) if module.norm_topk_prob else p
    expected = sum(p[..., [index]] * expert(x) for index, expert in enumerate(module.experts))
    expected += 0 if module.shared_experts is None else module.shared_experts(x)
    assert distance(module(x), expected) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bfloat16_chooses_the_same_experts_as_float32(name):
    """The golden texts have no near-ties: the last chosen expert leads by at least 2.6 %.

    With near-ties, bfloat16 would be close to float32 (test_decoder.py) only by chance.
    """
    ids, mask, _ = golden_example(name)
    choices = []
    for dtype in (torch.float32, torch.bfloat16):
        model = mb.load_model(GOLDEN / name, dtype=dtype)
        outputs = []
        for router in routers_of(model):
            router.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
        model(ids)
        choices.append(torch.stack([chosen[mask.flatten().bool()].sort().values for _, chosen in outputs]))
        assert all(probabilities.dtype == torch.float32 for probabilities, _ in outputs)
    assert torch.equal(*choices)


@pytest.mark.parametrize("name", ["deepseek", "deepseek_norm"])
def test_greedy_ids_of_deepseek_equal_those_of_the_reference(name):
    """transformers has no DeepSeek-MoE; test_generate.py tests Mixtral."""
    prompt = golden_example(name)[0][:1, :6]
    (ids,) = generate_ids(mb.load_model(GOLDEN / name), prompt.tolist(), Decoding(max_new_tokens=12))
    tensors = load_file(GOLDEN / name / "model.safetensors")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    logits = deepseek_reference.logits(tensors, config, prompt[0].tolist() + ids)
    assert ids == logits[5:-1].argmax(-1).tolist() and len(set(ids)) > 2


# Adapting.


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_adapted_and_routers_are_not(name):
    model = mb.load_model(GOLDEN / name)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    mb.adapt(model, rank=3)
    adapted = {n for n, _ in adapted_layers(model)}
    assert (
        adapted == linears and any(".experts.3." in n for n in adapted) and not any(".gate" == n[-5:] for n in adapted)
    )
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert routers and not any(router.weight.requires_grad for router in routers)
    for target in ("gate", "block_sparse_moe.gate", "mlp.gate"):
        with pytest.raises(ValueError, match=f"no linear layer is called {target}"):
            mb.adapt(mb.load_model(GOLDEN / name), rank=3, targets=target)


def test_one_expert_can_be_a_target():
    model = mb.adapt(mb.load_model(GOLDEN / "mixtral"), rank=3, targets="experts.2.w1")
    assert [n for n, _ in adapted_layers(model)] == [f"model.layers.{i}.block_sparse_moe.experts.2.w1" for i in (0, 1)]


@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_an_expert_without_tokens_has_zero_gradients(init):
    """All ranks then sum the same tensors, and a checkpoint has Adam's moments of all trained parameters."""
    module = mixture("deepseek", rank=3, init=init)
    module(torch.randn(1, 1, 24)).sum().backward()
    gradients = [[p.grad for p in expert.parameters() if p.requires_grad] for expert in module.experts]
    assert sum(any(g.any() for g in of_expert) for of_expert in gradients) == module.gate.top_k
    assert all(g is not None and len(of_expert) == 6 for of_expert in gradients for g in of_expert)


@torch.no_grad()
def test_without_autograd_only_chosen_experts_compute():
    module, visited = mixture("deepseek"), []
    for index, expert in enumerate(module.experts):
        expert.register_forward_hook(lambda *_, index=index: visited.append(index))
    x = torch.randn(1, 1, 24)
    module(x)
    assert visited == sorted(module.gate(x[0])[1].flatten().tolist())


def test_only_routers_of_a_loaded_model_are_frozen():
    model = mb.load_model(GOLDEN / "deepseek")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2)}


# Gradient checkpointing and compiling.


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_blocks_changes_neither_gradients_nor_load_balance(name):
    rows = random_rows(5, 2)
    plain, checkpointed = (mb.adapt(mb.load_model(GOLDEN / name), rank=3) for _ in range(2))
    checkpoint_blocks(checkpointed)
    for model in (plain, checkpointed):
        stretch(model)
    expected, result = (gradients_of_a_step(model, rows, 3, BALANCED) for model in (plain, checkpointed))
    assert torch.equal(result[0], expected[0]) and result[1:] == expected[1:]


def test_mixtures_are_not_compiled():
    model = mb.load_model(GOLDEN / "deepseek")
    compile_blocks(model)
    dense, *sparse = [layer.mlp for layer in model.model.layers]
    assert dense._compiled_call_impl is not None
    assert all(m._compiled_call_impl is None for mixture in sparse for m in mixture.modules())


# The routers' load balance.


@pytest.mark.parametrize("name", ["mixtral", "mixtral_window"])
def test_load_balance_of_packed_rows_equals_that_of_transformers(name):
    """transformers' value is for padded rows and counts only real tokens."""
    ids, mask, _ = golden_example(name)
    expected = load_file(GOLDEN / name / "expected.safetensors")["load_balance"]
    model, lengths = mb.load_model(GOLDEN / name), mask.sum(1).tolist()
    keep_router_outputs(model.requires_grad_(False))
    model.packed(ids[mask.bool()], lengths, lengths)
    assert load_balance(model).item() == pytest.approx(expected.item(), rel=1e-6)


def test_balance_is_the_number_of_choices_if_perfect_and_of_experts_if_collapsed():
    chosen = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
    assert balance(torch.full((5, 5), 0.2), chosen) == pytest.approx(2)
    collapsed = torch.eye(5)[:1].expand(5, 5)
    assert balance(collapsed, torch.zeros(5, 1, dtype=torch.long)) == pytest.approx(5)


def test_load_balance_adds_to_the_loss_and_to_the_gradient_of_earlier_layers():
    model, rows = mb.adapt(mb.load_model(GOLDEN / "mixtral"), rank=3), random_rows(6, 1)
    without, plain_loss, plain_terms = gradients_of_a_step(model, rows, 6, NLG_RECIPES["iclr2026"])
    gradient, loss, terms = gradients_of_a_step(model, rows, 6, BALANCED)
    assert terms.keys() - plain_terms.keys() == {"router_aux"}
    assert loss == pytest.approx(plain_loss + 0.7 * terms["router_aux"], rel=1e-6)
    gradients_of_a_step(model, rows, 6, dataclasses.replace(NLG_RECIPES["iclr2026"], router_aux=0.7))
    factor = model.model.layers[0].self_attn.v_proj.A
    assert distance(gradient, without) > 1e-3 and factor.grad.any()
    assert "+ 0.7 x load balance of the experts" in nlg_formula(BALANCED)
    assert "load balance" not in nlg_formula(NLG_RECIPES["iclr2026"])


def test_load_balance_comes_from_the_last_pass_with_gradients_and_is_read_once():
    model = mb.adapt(mb.load_model(GOLDEN / "mixtral"), rank=3)
    ids, others = torch.tensor([[3, 5]]), torch.tensor([[7]])
    keep_router_outputs(model)
    model(ids)
    expected = load_balance(model)
    model(others)
    model(ids)
    with mb.pretrained(model):
        model(others)
    assert torch.equal(load_balance(model), expected)
    with pytest.raises(ValueError, match="keep_router_outputs"):
        load_balance(model)
    with torch.no_grad():
        model(others)
    with pytest.raises(ValueError, match="with gradients"):
        load_balance(model)


def test_no_router_is_watched_after_a_failed_pass():
    model = mb.load_model(GOLDEN / "mixtral")
    keep_router_outputs(model)
    with pytest.raises(IndexError):
        model(torch.tensor([[3, 1000]]))
    assert not any(router.is_watched for router in routers_of(model))


def test_routers_keep_no_outputs_after_a_checkpointed_backward_pass():
    """The recomputed outputs would keep the activations of every block alive."""
    model = mb.adapt(mb.load_model(GOLDEN / "deepseek"), rank=3)
    checkpoint_blocks(model)
    keep_router_outputs(model)
    loss = model(torch.tensor([[3, 5, 7]])).square().mean() + load_balance(model)
    loss.backward()
    assert [router.outputs for router in routers_of(model)] == [None, None]


def test_the_probability_of_a_single_chosen_expert_is_normalised_only_in_mixtral(tmp_path):
    """As in the published code: Mixtral's weight is then 1, DeepSeek's is the probability."""
    for name, expected in (("deepseek_norm", False), ("mixtral", True)):
        config = json.loads((GOLDEN / name / "config.json").read_text()) | {"num_experts_per_tok": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path).norm_topk_prob == expected


def test_autocast_does_not_round_probabilities():
    """--method full in bfloat16 uses autocast; with rounding, one token in a hundred would get other experts."""
    router = mb.load_model(GOLDEN / "mixtral").model.layers[0].block_sparse_moe.gate
    rows = torch.randn(500, 24)
    probabilities, chosen = router(rows)
    with torch.autocast("cpu", torch.bfloat16):
        probabilities_in_autocast, chosen_in_autocast = router(rows)
        loss = balance(probabilities_in_autocast, chosen_in_autocast)
    assert torch.equal(probabilities_in_autocast, probabilities) and torch.equal(chosen_in_autocast, chosen)
    assert torch.equal(loss, balance(probabilities, chosen)) and loss.dtype == torch.float32


# Files.


def test_an_adapter_that_changes_a_router_is_refused(tmp_path, refuses):
    folder = shutil.copytree(GOLDEN / "adapter_mixtral", tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    name, tensors = "model.layers.1.block_sparse_moe.gate", load_file(file)
    save_file(tensors | {f"base_model.model.{name}.lora_{part}.weight": torch.ones(6, 6) for part in "AB"}, file)
    refuses(
        lambda: mb.load_adapter(mb.load_model(GOLDEN / "mixtral"), folder), file, name, "router", "merge it in PEFT"
    )


@pytest.mark.parametrize(
    "name, changes, parts",
    [
        ("mixtral", {"num_experts_per_tok": 5}, ["num_experts_per_tok is 5", "num_local_experts is 4"]),
        ("deepseek", {"num_experts_per_tok": 6}, ["num_experts_per_tok is 6", "n_routed_experts is 5"]),
        ("mixtral", {"num_local_experts": 0}, ["num_local_experts"]),
        ("mixtral", {"num_local_experts": 2**20}, ["experts", "tensors"]),
        ("deepseek", {"n_routed_experts": 2**20}, ["experts", "tensors"]),
        ("deepseek", {"n_routed_experts": None}, ["n_routed_experts", "missing"]),
        ("deepseek", {"moe_intermediate_size": None}, ["moe_intermediate_size", "missing"]),
        ("deepseek", {"num_experts_per_tok": None}, ["num_experts_per_tok", "missing"]),
        ("deepseek", {"n_shared_experts": -1}, ["n_shared_experts"]),
        ("deepseek", {"moe_layer_freq": 0}, ["moe_layer_freq"]),
        ("deepseek", {"first_k_dense_replace": -1}, ["first_k_dense_replace"]),
        ("deepseek", {"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid", "softmax"]),
        ("deepseek", {"norm_topk_prob": 1}, ["norm_topk_prob"]),
        ("deepseek", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise", "0.1"]),
        ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, ["hidden_act", "silu"]),
        ("mixtral", {"sliding_window": "5"}, ["sliding_window"]),
        ("mixtral", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(tmp_path, refuses, name, changes, parts):
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuses(lambda: mb.load_model(folder), *parts)


def test_published_settings_are_read(tmp_path):
    """The settings are from mistralai/Mixtral-8x7B-v0.1 and deepseek-ai/deepseek-moe-16b-base."""
    mixtral = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    mixtral |= {"model_type": "mixtral", "vocab_size": 32000, "rms_norm_eps": 1e-5, "sliding_window": None}
    deepseek = {"hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 28, "num_attention_heads": 16}
    deepseek |= {"model_type": "deepseek", "vocab_size": 102400, "rms_norm_eps": 1e-6, "first_k_dense_replace": 1}
    deepseek |= {"moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6}
    deepseek |= {"pretraining_tp": 1, "aux_loss_alpha": 0.001, "auto_map": {"AutoModel": "modeling_deepseek.x"}}
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    config = read_config(tmp_path)
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (8, 2, True)
    assert config.rope_theta == 1e6 and config.windows == (None,) * 32 and config.expert_size == 14336
    (tmp_path / "config.json").write_text(json.dumps(deepseek))
    config = read_config(tmp_path)
    assert config.has_experts == (False,) + (True,) * 27 and config.rope_theta == 1e4 and not config.norm_topk_prob
    assert (config.expert_size, config.shared_size, config.intermediate_size) == (1408, 2 * 1408, 10944)


def test_a_merged_checkpoint_keeps_the_python_files_that_its_config_names(tmp_path):
    """transformers runs the model with these files. Only modules of the folder are copied, and none is run."""
    folder = shutil.copytree(GOLDEN / "deepseek", tmp_path / "base")
    path = folder / "config.json"
    code = {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModel": "../elsewhere.Model", "Other": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": code}))
    (folder / "configuration_deepseek.py").write_text("raise SystemExit")
    (tmp_path / "elsewhere.py").write_text("")
    mb.save_model(mb.load_model(folder), tmp_path / "merged")
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {
        "config.json", "model.safetensors", "configuration_deepseek.py"
    }  # fmt: skip


# Runs.


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["train_nlg.py", *map(str, arguments)])
    return train_nlg.main()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with tiny random mixtures that have the built-in LLaMA's tokenizer, and with data."""
    root = tmp_path_factory.mktemp("mixtures")
    for name in ("mixtral", "deepseek"):
        with_toy_tokenizer(name, root / name)
    rows = [{"query": f"What is {i} + {i}?", "response": f"The answer is: {2 * i}"} for i in range(12)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--rank", "4", "--router-aux-loss", "0.01", "--grad-checkpoint"],
        ["--rank", "4", "--method", "lora", "--quantize", "nf4"],
        ["--method", "full", "--router-aux-loss", "0.01"],
    ],
)
def test_train_nlg_trains_a_mixture(folders, tmp_path, monkeypatch, capsys, name, flags):
    source = ["--model", folders / name, "--data", folders / "data.jsonl", "--out", tmp_path / "run", "--device", "cpu"]
    assert run(monkeypatch, *source, "--max-steps", 3, "--batch-size", 4, "--micro-batch-size", 2, *flags) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    is_on = "--router-aux-loss" in flags
    assert len(log) == 3 and all(("router_aux" in entry) == is_on for entry in log)
    assert ("0.01 x load balance" in capsys.readouterr().out) == is_on
    if "full" in flags:
        before, after = (
            load_file(folder / "model.safetensors") for folder in (folders / name, tmp_path / "run" / "model")
        )
        same = {tensor for tensor in before if torch.equal(before[tensor].float(), after[tensor].float())}
        routers = {tensor for tensor in before if tensor.endswith(".gate.weight")}
        experts_without_tokens = {tensor for tensor in same if ".experts." in tensor}
        assert same - experts_without_tokens == routers and len(experts_without_tokens) < 6


def test_router_aux_loss_is_refused_for_a_model_without_routers(tmp_path, monkeypatch, refuses):
    flags = ["--router-aux-loss", "0.01", "--out", tmp_path / "run", "--device", "cpu"]
    refuses(lambda: run(monkeypatch, *flags), "--router-aux-loss", "no experts", "leave it out")
    assert not (tmp_path / "run").exists()
