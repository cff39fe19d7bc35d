"""Makes `tests/golden/`: tiny random checkpoints with the logits that transformers and PEFT give for them.

Needs transformers and peft, which the project itself never imports: `python tests/make_golden.py` in an environment
that has them and minibalora. Every folder is a checkpoint as transformers writes it, plus expected.safetensors.
"""

import json
import shutil

import torch
from helpers import GOLDEN, stretch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig

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
}


def random_batch(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 17, 9 and 1 tokens, padded on the right."""
    ids = torch.randint(vocab_size, (3, 17))
    mask = torch.arange(17) < torch.tensor([[17], [9], [1]])
    return ids.masked_fill(~mask, 0), mask.long()


@torch.no_grad()
def make_model(name: str, config) -> None:
    """Weights are rounded to bfloat16, which keeps the files small, and large enough that attention is not flat."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter).mul(0.3).bfloat16())
    folder = GOLDEN / name
    model.bfloat16().save_pretrained(folder, max_shard_size="20KB" if name == "llama3" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids, mask = random_batch(config.vocab_size)
    logits = model(ids, attention_mask=mask).logits
    save_file({"input_ids": ids, "attention_mask": mask, "logits": logits}, folder / "expected.safetensors")


def spell_rope_the_old_way(name: str) -> None:
    """What transformers 4 wrote: rope_theta at the top level, the rest in rope_scaling; LLaMA 2 had neither."""
    path = GOLDEN / name / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if name == "llama3":
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def make_adapter(base: str, init: str) -> None:
    """An adapter that we save, and what PEFT makes of it on transformers' own model of the untouched base."""
    folder = GOLDEN / f"adapter_{init}"
    torch.manual_seed(1)
    model = mb.adapt(mb.load_model(GOLDEN / base), rank=3, alpha=5, init=init)
    if init == "lora":
        for _, layer in mb.lowrank.adapted_layers(model):
            layer.B.data.normal_(std=0.1)
    stretch(model)
    mb.save_adapter(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}, indent=2) + "\n")

    theirs = AutoModelForCausalLM.from_pretrained(GOLDEN / base, dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(theirs, folder).eval()
    expected = load_file(GOLDEN / base / "expected.safetensors")
    logits = theirs(expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    save_file({"logits": logits}, folder / "expected.safetensors")
    ours = model(expected["input_ids"])[expected["attention_mask"].bool()]
    error = (ours - logits[expected["attention_mask"].bool()]).abs().max() / logits.abs().max()
    print(f"adapter_{init}: largest difference from PEFT {error:.1e} of the logits' scale")


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        make_model(name, config)
    for name in ("llama2", "llama3"):
        spell_rope_the_old_way(name)
    for init in ("pissa", "lora"):
        make_adapter("llama3", init)
    for name in CONFIGS:
        expected = load_file(GOLDEN / name / "expected.safetensors")
        with torch.no_grad():
            logits = mb.load_model(GOLDEN / name)(expected["input_ids"], expected["attention_mask"])
        real = expected["attention_mask"].bool()
        error = (logits - expected["logits"])[real].abs().max() / expected["logits"][real].abs().max()
        print(f"{name}: largest difference from transformers {error:.1e} of the logits' scale")


if __name__ == "__main__":
    main()
