"""The work that `python -m minibalora bench` times: published shapes with random weights, rows as long as GSM8K's, and
the optimisation step of train_nlg.py for each contender.
"""

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW

from minibalora import variants
from minibalora.data.batches import Packed, Row, pack
from minibalora.lean_product import factors_kept, use_lean_product
from minibalora.lowrank import adapt
from minibalora.models.decoder import Decoder
from minibalora.models.llama import LlamaConfig, llama
from minibalora.objective import NLG_RECIPES, Objective, head_of, lambdas
from minibalora.run.adapting import empty_factors
from minibalora.run.cache import Cache
from minibalora.run.hardware import fit_hardware
from minibalora.run.loop import is_mixed, optimizer_of
from minibalora.run.methods import SETTINGS, STARTS
from minibalora.run.settings import Hardware
from minibalora.run.teacher import open_cache, teacher_states

# From their config.json files.
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    windows=(None,) * 32, qk_norm=False, qkv_bias=False, o_bias=False, mlp_bias=False, tie_word_embeddings=False,
    activation="silu", norm_offset=0.0, embedding_scale=1.0, max_position_embeddings=4096, initializer_range=0.02,
)  # fmt: skip
GEMMA_7B = replace(
    LLAMA_2_7B, vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=16, head_dim=256, rms_norm_eps=1e-6, max_position_embeddings=8192,
    tie_word_embeddings=True, activation="gelu_tanh", norm_offset=1.0, embedding_scale=3072**0.5, windows=(None,) * 28,
)  # fmt: skip
MISTRAL_7B = replace(
    LLAMA_2_7B, intermediate_size=14336, num_key_value_heads=8, windows=(4096,) * 32, max_position_embeddings=32768
)
# 60 M parameters: LLaMA-2's proportions and vocabulary, an eighth of its width, a quarter of its depth.
SMALL = replace(
    LLAMA_2_7B, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, head_dim=64, windows=(None,) * 8,
)  # fmt: skip
SHAPES = {"llama-2-7b": LLAMA_2_7B, "mistral-7b": MISTRAL_7B, "gemma-7b": GEMMA_7B, "small": SMALL}
STEPS = 100  # of a run; each measured step is the one in the middle, where every term of iclr2026 has a weight
LEARNING_RATE = 2e-5
SHARED = 29  # tokens that begin every row: BOS and Alpaca's preamble in LLaMA's tokenizer
# The lengths of 32 rows of GSM8K's training set in Alpaca's template and LLaMA's tokens: the rows at 1/64, 3/64, ... of
# all 7473 when sorted by length, shuffled. Their mean is 101 + 130 tokens; that of all rows is 101 + 131.
PROMPTS = (150, 145, 106, 82, 75, 91, 128, 127, 74, 155, 70, 113, 89, 131, 67, 89, 122, 83, 74, 82, 97, 112, 96, 142)
PROMPTS += (71, 81, 86, 94, 153, 106, 75, 80)
RESPONSES = (135, 124, 104, 118, 84, 73, 219, 247, 101, 170, 110, 184, 106, 122, 86, 172, 154, 63, 51, 151, 93, 134)
RESPONSES += (143, 167, 156, 104, 135, 111, 277, 109, 63, 90)
FULL = 512  # tokens of a full row, the published --max-length; half of them are the response
Step = Callable[[int], float]  # takes the step with that index, from 0, and returns its loss before the update


@dataclass(frozen=True)
class Contender:
    method: str
    recipe: str | None = None  # for ba-lora
    form: str = "fused"  # or "mixed": the fused loss, the plain layer; "plain": both plain, with the exact SVD
    knows_teacher: bool = False  # whether --teacher-cache has the states of every row, as after the first epoch

    @property
    def objective(self) -> Objective:
        return NLG_RECIPES[self.recipe] if self.recipe else Objective()

    def __str__(self) -> str:
        return " ".join(filter(None, [self.method, self.recipe, "teacher cached" if self.knows_teacher else ""]))


@dataclass(frozen=True)
class Load:
    """The work that every contender gets."""

    config: LlamaConfig
    hardware: Hardware
    rank: int
    rows: int  # per step
    warmup: int  # steps that are not counted
    rounds: int  # steps that are counted

    def tokens_of(self, index: int) -> int:
        return sum(len(row.ids) for row in rows_of_step(self.config.vocab_size, index, self.rows))


def rows_of_step(vocab_size: int, index: int, count: int) -> list[Row]:
    """Return the next `count` of the 32 rows, with random ids that are the same for every contender and epoch."""
    random = np.random.default_rng(0)
    shared = random.integers(vocab_size, size=SHARED)
    own = [random.integers(vocab_size, size=sum(lengths) - SHARED) for lengths in zip(PROMPTS, RESPONSES, strict=True)]
    chosen = [(index * count + offset) % len(own) for offset in range(count)]
    return [Row(np.concatenate([shared, own[number]]), PROMPTS[number], number) for number in chosen]


def full_batch(config: LlamaConfig, count: int) -> Packed:
    """Return a micro-batch of `count` rows of FULL tokens that share no beginning."""
    ids = (np.arange(count)[:, None] + np.zeros(FULL, int)) % config.vocab_size
    return pack([Row(row, FULL // 2, number) for number, row in enumerate(ids)], "cpu")


def random_model(config: LlamaConfig, hardware: Hardware) -> Decoder:
    """Build the model on its device and in its dtype, so that a 7B model in bfloat16 never takes more than 13 GB."""
    with torch.device("meta"):
        model = llama(config).to(hardware.dtype)
    return fill(model.to_empty(device=hardware.device)).requires_grad_(False)


def empty_model(config: LlamaConfig, dtype: torch.dtype, rank: int, contender: Contender) -> Decoder:
    """Return the contender's model, ready to train, on the meta device. DoRA can't start there."""
    with torch.device("meta"):
        model = llama(config).to(torch.float32 if contender.method == "full" else dtype)
    return fitted(model, contender, rank, lambda _, weight: empty_factors(weight, rank, "meta"))


def fitted(model: Decoder, contender: Contender, rank: int, factors: Callable | None = None) -> Decoder:
    """Give the model the contender's layers, in place, as train_nlg.py does. factors: see `adapt`.

    PiSSA starts from the factors that are fastest to compute: their numbers do not affect the time.
    """
    method = contender.method
    if method == "full":
        return model.requires_grad_(True)
    init = "pissa_niter_0" if STARTS[method][0] == "pissa" else STARTS[method][0]
    alpha = variants.rslora_alpha(rank, rank) if method == "rslora" else rank
    adapt(model, rank, alpha, init, factors=factors)
    if method in variants.VARIANTS:
        variants.use(model, method, **SETTINGS[method])
    elif contender.form == "fused":
        use_lean_product(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Fill in random weights that depend only on each tensor's name, shape, dtype and device; norms become 1."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def steps_of(load: Load, contenders: list[Contender], folder: str | None = None) -> dict[Contender, Step]:
    """Return the step of each contender. folder: where the teacher cache goes, if a contender has one.

    All models share the frozen weights, and PiSSA and BA-LoRA share a model: its numbers do not affect the time. `full`
    has weights of its own, which it trains, in float32.
    """
    is_base_used = any(each.method != "full" for each in contenders)
    base, models, steps = random_model(load.config, load.hardware) if is_base_used else None, {}, {}
    for each in contenders:
        kind = each.method.replace("ba-lora", "pissa"), each.form
        if kind not in models:
            torch.manual_seed(0)
            if each.method == "full":
                model = random_model(load.config, replace(load.hardware, dtype=torch.float32))
            else:
                model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
            fit_hardware(fitted(model, each, load.rank).train(), load.hardware)
            models[kind] = model, optimizer_of(model, SETTINGS["lora+"]["ratio"] if each.method == "lora+" else 1.0)
        cache = open_cache(Path(folder), "bench", [], 0) if each.knows_teacher else None
        steps[each] = step_of(*models[kind], load, each, cache)
    return steps


def step_of(model: Decoder, optimizer: AdamW, load: Load, contender: Contender, cache: Cache | None) -> Step:
    """Return the optimisation step of train_nlg.py for one micro-batch; fill the cache with the teacher's states.

    What AdaLoRA, DyLoRA and DeltaLoRA do at certain steps of a run is spread over all the steps of the load.
    """
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * group.get("ratio", 1.0)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    head, objective = head_of(model, is_plain=contender.form == "plain"), contender.objective
    weights, steps = lambdas(objective, STEPS // 2, STEPS), load.warmup + load.rounds
    device, mixed = load.hardware.device, is_mixed(model, load.hardware)

    def inputs(index: int) -> tuple[Packed, torch.Tensor | None]:
        rows = rows_of_step(load.config.vocab_size, index, load.rows)
        batch = pack(rows, device)
        return batch, teacher_states(model, [batch], [rows], cache)[0] if objective.needs_teacher else None

    def step(index: int) -> float:
        variants.before_step(model, index, seed=0)
        with factors_kept(model):
            batch, teacher = inputs(index)
            with torch.autocast(device.type, load.hardware.dtype, mixed):
                loss, _ = head.loss(batch.states(model), teacher, batch.targets, objective, weights)
            loss.backward()
        variants.add_penalty(model)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        value = loss.item()
        optimizer.step()
        variants.after_step(model, index + 1, steps)
        optimizer.zero_grad()
        return value

    for index in range(steps) if cache else ():
        inputs(index)
    return step
