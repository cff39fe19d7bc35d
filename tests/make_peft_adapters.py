"""Make golden values with PEFT: `tests/golden/peft_*/`, adapters that PEFT saves; `adapter_*` of the variants of LoRA,
which we save, both with PEFT's logits; and `variants.safetensors`, PEFT's numbers for single layers.

Run `python tests/make_peft_adapters.py [name ...]` after make_golden.py, which makes the bases, in an environment with
minibalora, transformers and peft. Without names, all are made. Prints how close our logits are.
"""

import json
import shutil
import sys
from types import SimpleNamespace

import torch
from helpers import GOLDEN, golden_example, named_example, real_tokens
from make_golden import CLASSIFIERS, auto_class_of, report
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import minibalora as mb
from minibalora.lowrank import adapted_layers
from minibalora.variants import use

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONFIGS = {"ADALORA": AdaLoraConfig, "LOHA": LoHaConfig}
ADAPTERS = {  # name: base, LoraConfig, or the config of a peft_type
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
    "peft_dora": (
        "llama3",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_dora": True,
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"v_proj": 2},
        },
    ),
    "peft_dora_pissa": (
        "qwen2",
        {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": ATTENTION, "init_lora_weights": "pissa"},
    ),
    "peft_dora_gpt2": (
        "gpt2",
        {"r": 3, "use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "peft_adalora": (
        "llama2",
        {
            "peft_type": "ADALORA",
            "init_r": 4,
            "target_r": 2,
            "lora_alpha": 7,
            "total_step": 6,
            "tfinal": 2,
            "target_modules": [*ATTENTION, "down_proj"],
        },
    ),
    "peft_loha": (
        "mistral_window",
        {
            "peft_type": "LOHA",
            "r": 3,
            "alpha": 40,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
        },
    ),
    "peft_pissa_converted": ("llama3", {"r": 2, "target_modules": ATTENTION, "init_lora_weights": "pissa"}),
}


def make_adapter(name: str, base: str, settings: dict) -> None:
    torch.manual_seed(2)
    model = auto_class_of(base).from_pretrained(GOLDEN / base, dtype=torch.float32, attn_implementation="eager")
    peft_type = settings.get("peft_type")
    model = get_peft_model(model, CONFIGS.get(peft_type, LoraConfig)(**settings))
    folder = GOLDEN / name
    if name == "peft_pissa_converted":
        model.peft_config["default"].init_lora_weights = True  # PEFT's documented way to save the initial adapter
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)  # as if trained
    for step in range(1, 1 + settings.get("total_step", 0)):  # AdaLoRA's budget
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        model.base_model.update_and_allocate(step)
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


OURS = {  # adapters that we save and PEFT reads: base, variant, init, whether it is saved as a LoRA
    "adapter_dora": ("llama3", "dora", "pissa", True),
    "adapter_dora_gpt2": ("gpt2", "dora", "lora", True),
    "adapter_adalora": ("llama2", "adalora", "lora", False),
    "adapter_adalora_gpt2": ("gpt2", "adalora", "lora", False),
    "adapter_adalora_lora": ("llama2", "adalora", "lora", True),
    "adapter_loha": ("mistral_window", "loha", "lora", False),
    "adapter_loha_lora": ("mistral_window", "loha", "lora", True),
    "adapter_dylora": ("llama3", "dylora", "lora", True),
    "adapter_deltalora": ("llama3", "deltalora", "lora", True),
}


@torch.no_grad()
def make_ours(name: str, base: str, variant: str, init: str, as_lora: bool) -> None:
    """Save an adapter with minibalora, and the logits of transformers' model of the base with PEFT and this adapter."""
    torch.manual_seed(5)
    model = use(mb.adapt(mb.load_model(GOLDEN / base), rank=3, alpha=5, init=init), variant)
    for index, (_, layer) in enumerate(adapted_layers(model)):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)  # as if trained
        if variant == "adalora":
            layer.Lambda[index % 4 :] = 0  # as if pruned to ranks 0 to 3
    mb.save_adapter(model, GOLDEN / name, as_lora=as_lora)
    path = GOLDEN / name / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}, indent=2) + "\n")
    inputs = named_example(base)
    del inputs["logits"]
    peft_model = auto_class_of(base).from_pretrained(GOLDEN / base, dtype=torch.float32, attn_implementation="eager")
    logits = PeftModel.from_pretrained(peft_model, GOLDEN / name).eval()(**inputs).logits
    save_file({"logits": logits}, GOLDEN / name / "expected.safetensors")
    real = real_tokens(base)
    report(name, model(*inputs.values())[real], logits[real])


LAYERS = {  # a linear of 11 x 7
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["0"]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=["0"]),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["0"]),
    "rslora": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["0"]),
    "olora": LoraConfig(r=3, lora_alpha=5, init_lora_weights="olora", target_modules=["0"]),
}


def variants() -> dict[str, torch.Tensor]:
    """Return for each of LAYERS its weights, as if trained, an x, y, and the gradients of (y · y_weights).sum().

    And for AdaLoRA a run of 12 steps on three layers: gradients, values after each step, importance after step 8, and
    the penalty with its gradient at the start.
    """
    values = {}
    for name, config in LAYERS.items():
        torch.manual_seed(3)
        linear = nn.Linear(11, 7)
        values |= {f"{name}/weight": linear.weight.detach().clone(), f"{name}/bias": linear.bias.detach().clone()}
        model = get_peft_model(nn.Sequential(linear), config)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trained.values():
                parameter += 0.3 * torch.randn_like(parameter)
        x, y_weights = torch.randn(5, 11, requires_grad=True), torch.randn(5, 7)
        y = model(x)
        gradients = torch.autograd.grad((y * y_weights).sum(), [x, *trained.values()])
        leaves = ["x", *(key.removesuffix(".weight").removesuffix(".default").rpartition(".")[2] for key in trained)]
        values |= {f"{name}/y": y, f"{name}/y_weights": y_weights}
        for leaf, tensor, gradient in zip(leaves, [x, *trained.values()], gradients, strict=True):
            values |= {f"{name}/{leaf}": tensor, f"{name}/gradient/{leaf}": gradient}
    return values | adalora_run()


def adalora_run() -> dict[str, torch.Tensor]:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 4)])

        def forward(self):
            return SimpleNamespace(loss=torch.zeros(()))

    torch.manual_seed(4)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=12, target_modules=["0", "1", "2"]
    )
    model, values = get_peft_model(Net(), config), {}
    trained = {
        key.split("layers.")[1].removesuffix(".default"): p for key, p in model.named_parameters() if p.requires_grad
    }
    values |= {f"run/start/{key}": parameter.clone() for key, parameter in trained.items()}
    penalty = model.base_model().loss  # the model itself does not add the penalty
    penalty.backward()
    values |= {"run/penalty": penalty} | {
        f"run/penalty/{key}": p.grad for key, p in trained.items() if p.grad is not None
    }
    for step in range(1, 13):
        for key, parameter in trained.items():
            parameter.grad = torch.randn_like(parameter)
            values[f"run/{step}/gradient/{key}"] = parameter.grad
            parameter.data -= 0.1 * parameter.grad
        model.base_model.update_and_allocate(step)
        values |= {f"run/{step}/{key}": parameter.clone() for key, parameter in trained.items() if "lora_E" in key}
        if step == 8:
            allocator = model.base_model.rankallocator
            for kind, numbers in (("I", allocator.exp_avg_ipt), ("U", allocator.exp_avg_unc)):
                values |= {
                    f"run/{kind}/{key.split('layers.')[1].removesuffix('.default')}": numbers[key] for key in numbers
                }
    return values


def main() -> None:
    for name in sys.argv[1:] or (*ADAPTERS, *OURS, "variants"):
        if name == "variants":
            values = {key: value.detach().clone().contiguous() for key, value in variants().items()}
            save_file(values, GOLDEN / "variants.safetensors")
            continue
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        if name in OURS:
            make_ours(name, *OURS[name])
        else:
            make_adapter(name, *ADAPTERS[name])
            compare(name, *ADAPTERS[name])


if __name__ == "__main__":
    main()
