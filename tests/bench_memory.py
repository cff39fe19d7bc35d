"""Compare the predicted and the measured memory of a training step: `python tests/bench_memory.py [word ...]`.

The measured value is the largest number of bytes of all live tensors during a step of the training scripts on the CPU.
It is counted when torch makes a tensor and when its storage is freed. `torch.cuda.max_memory_allocated` counts the
same, rounded by the allocator. The resident memory of the process would be useless here: torch itself, mapped files and
freed pages take more than these models.

A case is a shape, a method, a dtype and a kind of KINDS; the word for the first kind, "", is `plain`. With words, only
the cases that have all of these words run.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from minibalora import variants
from minibalora.checkpoints.families import read_family
from minibalora.data.batches import Row, micro_batches, pack
from minibalora.lean_product import factors_kept
from minibalora.models.mixture import keep_router_outputs, load_balance, routers_of
from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective, head_of, lambdas, nlu_loss
from minibalora.run import workload
from minibalora.run.adapting import adapt_model
from minibalora.run.hardware import fit_hardware
from minibalora.run.loop import optimizer_of
from minibalora.run.memory import LiveBytes, classification_loss, expected_memory, generation_loss
from minibalora.run.methods import METHODS, SETTINGS, STARTS
from minibalora.run.settings import Adaptation, Hardware
from minibalora.run.teacher import teacher_states

LLAMA = {
    "model_type": "llama", "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
    "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
BERT = LLAMA | {
    "model_type": "bert", "max_position_embeddings": 128, "hidden_dropout_prob": 0.1, "type_vocab_size": 2,
}  # fmt: skip
T5 = {
    "model_type": "t5", "is_encoder_decoder": True, "decoder_start_token_id": 0, "vocab_size": 5000, "d_model": 128,
    "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1,
}  # fmt: skip
SHAPES = {
    "toy": LLAMA | {"vocab_size": 512},
    "small": LLAMA | {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
                      "num_attention_heads": 8},
    "llama-3": LLAMA | {"num_key_value_heads": 1, "hidden_size": 192, "head_dim": 48, "intermediate_size": 672},
    "gpt2": {"model_type": "gpt2", "vocab_size": 5000, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gemma": LLAMA | {"model_type": "gemma", "vocab_size": 32000, "intermediate_size": 1024, "num_key_value_heads": 1,
                      "head_dim": 64},
    "gemma2": LLAMA | {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 48, "intermediate_size": 512},
    "qwen2": LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 48},
    "mixtral": LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4,
                        "num_experts_per_tok": 2},
    "deepseek": LLAMA | {"model_type": "deepseek", "n_routed_experts": 4, "num_experts_per_tok": 2,
                         "n_shared_experts": 2, "moe_intermediate_size": 96, "first_k_dense_replace": 1},
    "t5": T5,
    "flan-t5": T5 | {"d_ff": 352, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bert": BERT,
    "roberta": BERT | {"model_type": "roberta", "max_position_embeddings": 130, "type_vocab_size": 1},
    "deberta": BERT | {"model_type": "deberta-v2", "type_vocab_size": 0, "relative_attention": True,
                       "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm",
                       "pos_att_type": "p2c|c2p", "position_buckets": 64},
}  # fmt: skip
ROWS = 3  # rows of a micro-batch
KINDS = ("", "grad-checkpoint", "nf4", "one micro-batch", "plain form")


def cases() -> list[tuple[str, str, str, str]]:
    """Return all cases (shape, method, dtype, kind); NF4 only for PiSSA and BA-LoRA, and not for encoders."""
    combinations = []
    for shape in SHAPES:
        for method in METHODS:
            for dtype in ("float32", "bfloat16"):
                kinds = [kind for kind in KINDS if kind != "nf4" or method in ("pissa", "ba-lora")]
                kinds = [kind for kind in kinds if kind != "nf4" or not is_encoder(shape)]
                combinations += [(shape, method, dtype, kind) for kind in kinds]
    return combinations


def is_encoder(shape: str) -> bool:
    return SHAPES[shape]["model_type"] in ("bert", "roberta", "deberta-v2")


def compare(shape: str, method: str, dtype: str, kind: str, length: int = 192) -> tuple[int, int]:
    """Return the predicted and the measured bytes of a step on rows of `length` tokens, half of them response."""
    start, is_plain = "".join(STARTS[method][:1]), kind == "plain form"
    init, quantize = start.replace("pissa", "pissa_niter_1"), "nf4" if kind == "nf4" else None
    settings = SETTINGS.get(method, {})
    adaptation = Adaptation(method, 8, 8, init, quantize=quantize, is_plain=is_plain, settings=settings)
    hardware = Hardware(torch.device("cpu"), getattr(torch, dtype), grad_checkpoint=kind == "grad-checkpoint")
    torch.manual_seed(0)
    model = random_model(shape, torch.float32 if method == "full" else hardware.dtype)
    if method != "full":
        adapt_model(model, adaptation, hardware, seed=0)
    micro = 1 if kind == "one micro-batch" else 2
    if is_encoder(shape):
        loss_of, gradients = nlu_step(model, method, min(length, 128), micro)
    else:
        loss_of, gradients = nlg_step(model, method, length, micro, is_plain)
    if method == "full":
        model.requires_grad_(True)
    predicted = expected_memory(model, hardware, loss_of, accumulates=micro > 1)
    fit_hardware(model.train(), hardware)
    optimizer = optimizer_of(model, adaptation.rate_of_b)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # allocates Adam's moments
    optimizer.zero_grad()
    state = [value for values in optimizer.state.values() for value in values.values()]
    with LiveBytes(*model.parameters(), *model.buffers(), *state) as live, factors_kept(model):
        gradients(torch.autocast("cpu", hardware.dtype, method == "full" and dtype != "float32"))
        variants.add_penalty(model)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        variants.after_step(model, 3, 10)  # of 10 steps, AdaLoRA notes the importance in the third
    return predicted, live.peak


def random_model(shape: str, dtype: torch.dtype) -> nn.Module:
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[shape]))
        family, config = read_family(Path(folder))
    with torch.device("meta"):
        model = family.build(config, 3 if is_encoder(shape) else None)
    model.own_head = [family.names.head] if is_encoder(shape) else []
    return workload.fill(model.to(dtype).to_empty(device="cpu")).requires_grad_(False)


def nlg_step(model: nn.Module, method: str, length: int, micro: int, is_plain: bool):
    """Return the loss for `expected_memory`, and a function that adds the gradients of all micro-batches."""
    objective = NLG_RECIPES["iclr2026"] if method == "ba-lora" else Objective()
    if routers_of(model):
        objective = replace(objective, router_aux=0.01)
        keep_router_outputs(model)
    random = np.random.default_rng(0)
    shared = random.integers(model.config.vocab_size, size=workload.SHARED)
    ids = [np.concatenate([shared, random.integers(500, size=length - workload.SHARED)]) for _ in range(ROWS * micro)]
    parts = micro_batches([Row(row_ids, length // 2, line) for line, row_ids in enumerate(ids)], ROWS)
    loss_of = partial(generation_loss, pack(parts[0], "cpu"), objective, micro, is_plain)

    def gradients(autocast: torch.autocast) -> None:
        head, weights = head_of(model, is_plain), lambdas(objective, 50, 100)
        batches = [pack(part, "cpu") for part in parts]
        teachers = teacher_states(model, batches, parts) if objective.needs_teacher else [None] * micro
        for batch, teacher in zip(batches, teachers, strict=True):
            with autocast:
                student = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)
                loss, _ = head.loss(student, teacher, batch.targets, objective, weights)
                if objective.router_aux > 0:
                    loss = loss + objective.router_aux * load_balance(model)
            (loss / micro).backward()

    return loss_of, gradients


def nlu_step(model: nn.Module, method: str, length: int, micro: int):
    objective = NLU_RECIPES["iclr2026"] if method == "ba-lora" else Objective()
    ids, labels = torch.from_numpy(np.random.default_rng(0).integers(500, size=length)), torch.tensor([0, 1, 2])
    teacher, weights = torch.zeros(ROWS, 3), lambdas(objective, 50, 100)

    def gradients(autocast: torch.autocast) -> None:
        for _ in range(micro):
            with autocast:
                loss, _ = nlu_loss(model(ids.expand(ROWS, -1)), teacher, labels, objective, weights)
            (loss / micro).backward()

    return partial(classification_loss, (ids.expand(ROWS, -1),), labels, objective), gradients


def main() -> None:
    for case in cases():
        if set(sys.argv[1:]) <= {*case, *(["plain"] if not case[-1] else [])}:
            predicted, measured = compare(*case)
            ratio = predicted / measured
            remark = "" if abs(ratio - 1) <= 0.03 else "  more than 3 % off"
            print(f"{' '.join(case):44}{predicted / 1e6:9.1f}{measured / 1e6:9.1f} MB{ratio:7.3f}{remark}", flush=True)


if __name__ == "__main__":
    main()
