"""Make `tests/golden/`: tiny random checkpoints and adapters, with the logits of transformers and PEFT.

Run `python tests/make_golden.py [name ...]` in an environment with minibalora, transformers and peft; the package
itself never imports the latter two. Without names, all folders are made. Each folder has a checkpoint as transformers
writes it, and expected.safetensors. Random numbers depend only on the name. Prints how close our logits are.
"""

import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import deepseek_reference
import torch
from helpers import GOLDEN, golden_example, headless, named_example, real_tokens, stretch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe

import minibalora as mb

SIZE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YI_ROPE = {"rope_type": "default", "rope_theta": 5000000.0}
CONFIGS = {
    "llama2": LlamaConfig(**SIZE, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama3": LlamaConfig(
        **SIZE, num_attention_heads=6, num_key_value_heads=2, head_dim=8, rope_parameters=LLAMA3_ROPE
    ),
    "llama_bias_tied": LlamaConfig(
        **SIZE,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "mistral": MistralConfig(**SIZE, num_attention_heads=4, num_key_value_heads=2, sliding_window=None),
    "mistral_window": MistralConfig(
        **SIZE, num_attention_heads=4, num_key_value_heads=2, head_dim=10, sliding_window=5
    ),
    "gemma": GemmaConfig(**SIZE, num_attention_heads=4, num_key_value_heads=1, head_dim=12),
    "gpt2": GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=40),
    "yi": LlamaConfig(**SIZE, num_attention_heads=8, num_key_value_heads=2, head_dim=6, rope_parameters=YI_ROPE),
    "qwen2": Qwen2Config(**SIZE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_window": Qwen2Config(
        **SIZE,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "gemma2": Gemma2Config(  # the caps are low enough to change scores and logits
        **SIZE,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "qwen3": Qwen3Config(**SIZE, num_attention_heads=4, num_key_value_heads=2, head_dim=10),
    "mixtral": MixtralConfig(**SIZE, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4),
    "mixtral_window": MixtralConfig(
        **SIZE,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=5,
    ),
}
# transformers has no DeepSeek-MoE; deepseek_reference.py takes its place.
DEEPSEEK = SIZE | {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "hidden_act": "silu",
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
DEEPSEEKS = {
    "deepseek": DEEPSEEK,
    "deepseek_norm": DEEPSEEK
    | {"num_key_value_heads": 2, "norm_topk_prob": True, "n_shared_experts": None, "moe_layer_freq": 2}
    | {"first_k_dense_replace": 0},
}
T5 = {"vocab_size": 61, "d_model": 24, "d_ff": 40, "num_layers": 2, "decoder_start_token_id": 0}
FEW_BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
SEQ2SEQ = {  # prompts have up to 17 tokens, answers have 7
    "t5": T5Config(**T5, num_heads=3, d_kv=8, **FEW_BUCKETS),
    "t5_gated": T5Config(
        **T5,
        num_heads=3,
        d_kv=10,
        num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
}
DEBERTA_V3 = {
    "relative_attention": True,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p",
    "position_buckets": 6,  # for 17 tokens: far distances share a bucket, and the furthest are clamped
    "max_relative_positions": -1,
    "max_position_embeddings": 12,
    "type_vocab_size": 0,
}
CLASSIFIERS = {
    "bert": BertConfig(**SIZE, num_attention_heads=3, max_position_embeddings=20, num_labels=3),
    "bert_relu": BertConfig(
        **SIZE, num_attention_heads=2, max_position_embeddings=32, type_vocab_size=4, hidden_act="relu", num_labels=1
    ),
    "roberta": RobertaConfig(
        **SIZE, num_attention_heads=4, max_position_embeddings=22, type_vocab_size=1, pad_token_id=1, num_labels=2
    ),
    "xlm_roberta": XLMRobertaConfig(
        **SIZE, num_attention_heads=3, max_position_embeddings=22, type_vocab_size=1, pad_token_id=1, num_labels=3
    ),
    "deberta": DebertaV2Config(**SIZE, num_attention_heads=3, **DEBERTA_V3, num_labels=2),
    "deberta_tanh": DebertaV2Config(
        **SIZE,
        num_attention_heads=2,
        **(DEBERTA_V3 | {"position_buckets": 9, "max_relative_positions": 30, "hidden_act": "gelu_new"}),
        num_labels=3,
    ),
    "gpt2_classifier": GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=2, n_inner=40, n_positions=20, num_labels=3, pad_token_id=0
    ),
    "t5_classifier": T5Config(**T5, num_heads=3, d_kv=10, **FEW_BUCKETS, classifier_dropout=0.1, num_labels=3),
    "llama_classifier": LlamaConfig(**SIZE, num_attention_heads=4, num_key_value_heads=2, num_labels=2, pad_token_id=0),
}
ADAPTERS = {  # base, init, is_headless
    "adapter_pissa": ("llama3", "pissa", False),
    "adapter_lora": ("llama3", "lora", False),
    "adapter_qwen2": ("qwen2", "pissa", False),
    "adapter_qwen3": ("qwen3", "lora", False),
    "adapter_gemma2": ("gemma2", "pissa", False),
    "adapter_mixtral": ("mixtral", "pissa", False),
    "adapter_gpt2": ("gpt2_classifier", "pissa", False),
    "adapter_bert": ("bert", "lora", False),
    "adapter_roberta": ("roberta", "lora", True),
    "adapter_deberta": ("deberta", "pissa", True),
    "adapter_t5": ("t5", "pissa", False),
    "adapter_t5_gated": ("t5_gated", "lora", False),
    "adapter_t5_classifier": ("t5_classifier", "pissa", True),
}


def random_batch(vocab_size: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return three right-padded rows of 17, 9 and 1 tokens, and their mask. No real token is a padding id (0 or 1)."""
    ids = torch.randint(2, vocab_size, (3, 17))
    mask = torch.arange(17) < torch.tensor([[17], [9], [1]])
    return ids.masked_fill(~mask, padding), mask.long()


def auto_class_of(name: str) -> type:
    """Return transformers' class for a model of `tests/golden/`."""
    if name in CLASSIFIERS:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM


@torch.no_grad()
def make_checkpoint(name: str, config) -> torch.nn.Module:
    """Save a random checkpoint and return it as float32.

    Weights are rounded to bfloat16, which keeps the files small, and are large enough that attention is not flat.
    """
    auto_class = auto_class_of(name)
    model = auto_class.from_config(config, attn_implementation="eager")
    if name == "t5_gated":  # transformers 5 ties a new model's head; published v1.1 checkpoints have it untied
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter).mul(0.3).bfloat16())
    sharpen_routers(dict(model.named_parameters()))
    folder = GOLDEN / name
    model.bfloat16().save_pretrained(folder, max_shard_size="20KB" if name == "llama3" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def make_model(name: str, config) -> None:
    model = make_checkpoint(name, config)
    ids, mask = random_batch(config.vocab_size)
    expected = {"input_ids": ids, "attention_mask": mask, "logits": model(ids, attention_mask=mask).logits}
    if "mixtral" in name:
        expected["load_balance"] = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    save_file(expected, GOLDEN / name / "expected.safetensors")


def sharpen_routers(tensors: dict[str, torch.Tensor]) -> None:
    """Enlarge the routers' weights in place, so that the choice of experts is seldom nearly a tie."""
    for name, tensor in tensors.items():
        if name.endswith(".gate.weight"):
            tensor.mul_(8)


@torch.no_grad()
def make_deepseek(name: str, config: dict) -> None:
    """Make a checkpoint with the published names and settings, and the logits of deepseek_reference.py.

    The reference's mixture is compared with that of DeepSeek-V2, which transformers has: with greedy choice and without
    groups or scaling, both compute the same.
    """
    tensors = {name: torch.randn(s).mul(0.3).bfloat16() for name, s in deepseek_reference.shapes(config).items()}
    sharpen_routers(tensors)
    folder = GOLDEN / name
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids, mask = random_batch(config["vocab_size"])
    logits = torch.zeros(*ids.shape, config["vocab_size"])
    for row, length in enumerate(mask.sum(1).tolist()):
        logits[row, :length] = deepseek_reference.logits(tensors, config, ids[row, :length].tolist()).float()
    save_file({"input_ids": ids, "attention_mask": mask, "logits": logits}, folder / "expected.safetensors")
    if config["n_shared_experts"]:
        compare_with_v2(tensors, config)


def compare_with_v2(tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Compare the mixture of layer 1 of reference and DeepSeek-V2 on 50 random tokens."""
    names = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    v2 = DeepseekV2Config(num_attention_heads=1, **{key: config[key] for key in names})
    v2.topk_method, v2.routed_scaling_factor = "greedy", 1.0
    start = "model.layers.1."
    layer = {name.removeprefix(start): tensor.double() for name, tensor in tensors.items() if name.startswith(start)}
    gate, up, down = (
        torch.stack([layer[f"mlp.experts.{i}.{part}_proj.weight"] for i in range(config["n_routed_experts"])])
        for part in ("gate", "up", "down")
    )
    fused = {"experts.gate_up_proj": torch.cat([gate, up], dim=1), "experts.down_proj": down}
    rest = {name.removeprefix("mlp."): tensor for name, tensor in layer.items() if ".experts." not in name}
    v2_mixture = DeepseekV2Moe(v2).double()
    stored = v2_mixture.state_dict().keys()
    v2_mixture.load_state_dict(fused | {name: tensor for name, tensor in rest.items() if name in stored})
    x = torch.randn(1, 50, config["hidden_size"], dtype=torch.float64)
    reference = torch.stack([deepseek_reference.mixture(token, layer, config) for token in x[0]])
    report("deepseek_reference.mixture", reference, v2_mixture(x)[0])


@torch.no_grad()
def make_seq2seq(name: str, config) -> None:
    model = make_checkpoint(name, config)
    ids, mask = random_batch(config.vocab_size)
    answers = torch.randint(2, config.vocab_size, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answers}
    expected = {"logits": model(**inputs).logits}
    distances = torch.arange(-300, 301)
    for part in ("encoder", "decoder"):
        sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
        attention = getattr(model, part).block[0].layer[0].SelfAttention
        expected[f"{part}_buckets"] = attention._relative_position_bucket(distances, part == "encoder", *sizes)
    save_file(inputs | expected, GOLDEN / name / "expected.safetensors")


@torch.no_grad()
def make_classifier(name: str, config) -> None:
    """Make a classifier. BERT's first row has a second text with token type 1; T5's rows end with EOS."""
    model = make_checkpoint(name, config)
    ids, mask = random_batch(config.vocab_size, padding=config.pad_token_id)
    if name.startswith("t5"):
        ids[torch.arange(3), mask.sum(1) - 1] = config.eos_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("bert"):
        inputs["token_type_ids"] = ((torch.arange(17) > 8) & (mask.sum(1, keepdim=True) > 9)).long()
    logits = model(**inputs).logits
    save_file(inputs | {"logits": logits}, GOLDEN / name / "expected.safetensors")


def spell_rope_the_old_way(name: str) -> None:
    """Rewrite config.json as transformers 4 did: rope_theta at the top level and rope_scaling. LLaMA 2 had neither."""
    path = GOLDEN / name / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if name == "llama3":
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def make_adapter(name: str, base: str, init: str, is_headless: bool) -> None:
    """Save an adapter with minibalora, and the logits of transformers' model of the base with PEFT and this adapter.

    is_headless: the base has no pooler and no classifier; these are new, trained and saved in the adapter.
    """
    folder = GOLDEN / name
    is_classifier = base in CLASSIFIERS
    with tempfile.TemporaryDirectory() as temporary:
        path = headless(base, Path(temporary)) if is_headless else GOLDEN / base
        labels = CLASSIFIERS[base].num_labels if is_classifier else None
        model = mb.load_model(path, "classifier" if is_classifier else "lm", labels)
        mb.adapt(model, rank=3, alpha=5, init=init)
        if init == "lora":
            for _, layer in mb.lowrank.adapted_layers(model):
                layer.B.data.normal_(std=0.1)
        for module in model.own_head:
            for parameter in model.get_submodule(module).parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        stretch(model)
        mb.save_adapter(model, folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        base_model = auto_class_of(base).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        peft_model = PeftModel.from_pretrained(base_model, folder).eval()

    inputs = named_example(base)
    del inputs["logits"]
    logits = peft_model(**inputs).logits
    save_file({"logits": logits}, folder / "expected.safetensors")
    real = real_tokens(base)
    report(name, model(*inputs.values())[real], logits[real])


def report(name: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
    error = (logits - expected).abs().max() / expected.abs().max()
    print(f"{name}: largest difference from transformers is {error:.1e} of the logits' scale")


@torch.no_grad()
def main() -> None:
    for name in sys.argv[1:] or (*CONFIGS, *DEEPSEEKS, *SEQ2SEQ, *CLASSIFIERS, *ADAPTERS):
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        torch.manual_seed(zlib.crc32(name.encode()))
        make(name)


def make(name: str) -> None:
    """Make one folder of `tests/golden/`, and print how close our logits are."""
    if name in ADAPTERS:
        return make_adapter(name, *ADAPTERS[name])
    if name in SEQ2SEQ:
        make_seq2seq(name, SEQ2SEQ[name])
        *inputs, logits = golden_example(name)
        return report(name, mb.load_model(GOLDEN / name)(*inputs), logits)
    if name in CLASSIFIERS:
        make_classifier(name, CLASSIFIERS[name])
        *inputs, logits = golden_example(name)
        return report(name, mb.load_model(GOLDEN / name, head="classifier")(*inputs), logits)
    if name in DEEPSEEKS:
        make_deepseek(name, DEEPSEEKS[name])
    else:
        make_model(name, CONFIGS[name])
    if name in ("llama2", "llama3"):
        spell_rope_the_old_way(name)
    ids, mask, logits = golden_example(name)
    return report(name, mb.load_model(GOLDEN / name)(ids, mask)[mask.bool()], logits[mask.bool()])


if __name__ == "__main__":
    main()
