"""Make `tests/golden/peft_*/`: adapters that PEFT saves, with PEFT's logits.

Run `python tests/make_peft_adapters.py [name ...]` after make_golden.py, which makes the bases, in an environment with
minibalora, transformers and peft. Without names, all adapters are made. Prints how close our logits are.
"""

import json
import shutil
import sys

import torch
from helpers import GOLDEN, golden_example, named_example, real_tokens
from make_golden import CLASSIFIERS, auto_class_of, report
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

import minibalora as mb

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {  # name: base, LoraConfig
    "peft_lora": ("llama3", {"r": 3, "lora_alpha": 6, "target_modules": [*ATTENTION, "up_proj", "down_proj"]}),
    "peft_rslora_regex": (
        "mistral_window",
        {
            "r": 4,
            "lora_alpha": 7,
            "use_rslora": True,
            "target_modules": r".*\.(self_attn\.[qv]_proj|mlp\.down_proj)",
            "rank_pattern": {r"layers\.1\..*q_proj": 2, "down_proj": 5},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "peft_all_linear": ("gemma", {"r": 2, "target_modules": "all-linear", "exclude_modules": ["gate_proj"]}),
    "peft_last_block": ("llama2", {"r": 2, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]}),
    "peft_whole_head": (
        "llama2",
        {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "peft_adapted_head": ("llama3", {"r": 2, "target_modules": ["v_proj", "lm_head"]}),
    "peft_gpt2": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "peft_bert": ("bert", {"r": 3, "target_modules": ["query", "value", "dense"], "task_type": TaskType.SEQ_CLS}),
    "peft_roberta": ("roberta", {"r": 2, "target_modules": ["query", "key"], "task_type": TaskType.SEQ_CLS}),
    "peft_qwen2": ("qwen2", {"r": 3, "target_modules": "all-linear"}),
    "peft_t5": ("t5_gated", {"r": 3, "target_modules": ["q", "v", "wi_0"], "task_type": TaskType.SEQ_2_SEQ_LM}),
    "peft_t5_classifier": (
        "t5_classifier",
        {
            "r": 2,
            "target_modules": ["k", "o", "wi"],
            "task_type": TaskType.SEQ_CLS,
            "modules_to_save": ["classification_head"],  # PEFT adds only classifier and score by itself
        },
    ),
    "peft_pissa": ("llama3", {"r": 2, "target_modules": ATTENTION, "init_lora_weights": "pissa"}),
    "peft_pissa_rslora": (
        "llama2",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": [*ATTENTION, "down_proj", "lm_head"],
            "rank_pattern": {r"layers\.1\..*q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
            "init_lora_weights": "pissa",
        },
    ),
    "peft_pissa_gpt2": (
        "gpt2",
        {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
    ),
    "peft_olora": ("qwen2", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": "olora"}),
    "peft_pissa_converted": ("llama3", {"r": 2, "target_modules": ATTENTION, "init_lora_weights": "pissa"}),
}


def make_adapter(name: str, base: str, settings: dict) -> None:
    torch.manual_seed(2)
    model = auto_class_of(base).from_pretrained(GOLDEN / base, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(**settings))
    folder = GOLDEN / name
    if name == "peft_pissa_converted":
        model.peft_config["default"].init_lora_weights = True  # PEFT's documented way to save the initial adapter
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)  # as if trained
    start = {"path_initial_model_for_weight_conversion": folder / "start"} if (folder / "start").exists() else {}
    model.eval()
    inputs = named_example(base)
    del inputs["logits"]
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(folder, **start)
    shutil.rmtree(folder / "start", ignore_errors=True)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({"logits": logits}, folder / "expected.safetensors")


@torch.no_grad()
def compare(name: str, base: str, settings: dict) -> None:
    is_classifier = base in CLASSIFIERS
    *inputs, _ = golden_example(base)
    try:
        model = mb.load_adapter(mb.load_model(GOLDEN / base, "classifier" if is_classifier else "lm"), GOLDEN / name)
    except mb.InputError as error:
        print(f"{name}: refused: {error}")
        return
    real = real_tokens(base)
    report(name, model(*inputs)[real], load_file(GOLDEN / name / "expected.safetensors")["logits"][real])


if __name__ == "__main__":
    for name in sys.argv[1:] or ADAPTERS:
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        make_adapter(name, *ADAPTERS[name])
        compare(name, *ADAPTERS[name])
