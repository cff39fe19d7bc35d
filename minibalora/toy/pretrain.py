"""Train the built-in LLaMA and its BPE tokenizer from scratch: `python -m minibalora.toy.pretrain --out folder`.

This program made `llama/`. The corpus is `flawed_problems`, whose rates of defects are flags; the model's shape comes
from `llama/config.json`. This is pre-training: the loss counts prompts as well as responses.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from minibalora.base import cli
from minibalora.base.files import check_writable
from minibalora.base.progress import Progress
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.merged import save_model
from minibalora.checkpoints.tokenizer import load_tokenizer
from minibalora.checkpoints.weights import Checkpoint
from minibalora.data.batches import Row, encode_examples, pack, rows_of_step
from minibalora.evaluation.perplexity import whole_text
from minibalora.models.decoder import Decoder
from minibalora.models.llama import llama
from minibalora.run import checkpoint, run_folder
from minibalora.toy import MODEL
from minibalora.toy.problems import CROWDING_RATE, WRONG_RATE, examples_of, flawed_problems

FAMILY, CONFIG = read_family(MODEL)
CORPUS_ROWS, CORPUS_SEED = 200_000, 0
BATCH_SIZE, WARM_UP = 64, 100
SAVE_EVERY = 100  # steps


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it. Every digit is a token, which makes arithmetic easier to learn."""
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": byte_level.alphabet()}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=CONFIG.vocab_size, **settings))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def new_model(folder: Path, seed: int) -> Decoder:
    """Return a model with random weights as in GPT-2: std 0.02, divided by √(2 · layers) in a block's last linears."""
    shutil.copy(MODEL / "config.json", folder)
    torch.manual_seed(seed)
    model = llama(CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            ends_block = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, std=0.02 / (math.sqrt(2 * len(model.model.layers)) if ends_block else 1))
    model.checkpoint = Checkpoint(folder, FAMILY)
    return model


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: linear warm-up, then a cosine from `peak` down to 5 % of it."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return peak * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


def pretraining_loss(model: Decoder, rows: list[Row]) -> torch.Tensor:
    """Return the mean cross-entropy of all tokens except each row's first, prompts included."""
    batch = pack(whole_text(rows), model.embedding.weight.device)
    return F.cross_entropy(model.head(batch.states(model)), batch.targets)


def train(model: nn.Module, loss_of: Callable, rows: list, steps: int, peak: float, out: Path) -> None:
    """Train all parameters with AdamW, in the usual settings for small language models; loss_of(model, rows).

    Continues from the checkpoint in `out`, if there is one.
    """
    tokens = sum(len(row.ids) for row in rows) / len(rows)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokens:.0f} tokens a row", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    first = checkpoint.checkpoint_step(out) or 0
    if first > 0:
        checkpoint.load_checkpoint(out, model, optimizer)
    with Progress("steps", steps, "step", first) as bar:
        for step in range(first, steps):
            if step % SAVE_EVERY == 0:
                checkpoint.save_checkpoint(out, model, optimizer, step)
            torch.manual_seed(step)  # for the masks of BERT: the same ones if the training is continued here
            loss = loss_of(model, [rows[i] for i in rows_of_step(len(rows), BATCH_SIZE, CORPUS_SEED, step)])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(note=f"loss {loss.item():.4f}")


def make_parser(
    program: str, description: str, steps: int, lr: float, crowding: float, wrong: float
) -> argparse.ArgumentParser:
    """Return the flags of both programs; the defaults are those with which the built-in model was made."""
    parser = cli.OneLineParser(program, description.splitlines()[0])
    add = parser.add_argument
    add("--out", type=cli.path, required=True, help="folder for the checkpoint; the same command continues a stopped "
        "training")  # fmt: skip
    add("--steps", type=cli.positive_int, default=steps, help=f"optimisation steps of {BATCH_SIZE} rows ({steps})")
    add("--lr", type=cli.positive_rate, default=lr, help=f"peak learning rate ({lr})")
    add("--crowding", type=cli.fraction, default=crowding, metavar="SHARE", help="share of the corpus that is of the "
        f"most frequent kind or class ({crowding})")  # fmt: skip
    add("--wrong", type=cli.fraction, default=wrong, metavar="SHARE", help="share of wrong answers, of additions a "
        f"third as many; share of wrong stars ({wrong})")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def begin(args: argparse.Namespace) -> bool:
    """Start or continue the training in --out. Returns False if it has ended before."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "device")}
    if not (args.out / "run.json").exists():
        check_writable(args.out, "--out")
        run_folder.start_run(args.out, settings)
    run_folder.check_settings(args.out, settings)
    if (args.out / "model.safetensors").exists():
        print(f"{args.out}: the model is there")
        return False
    return True


def finish(model: nn.Module, out: Path) -> None:
    """Save the model in bfloat16, and delete the checkpoint of its training."""
    save_model(model.to(torch.bfloat16), out)
    shutil.rmtree(out / "checkpoint")


def main() -> int:
    args = make_parser("python -m minibalora.toy.pretrain", __doc__, 2500, 3e-3, CROWDING_RATE, WRONG_RATE).parse_args()
    if not begin(args):
        return 0
    corpus = examples_of(flawed_problems(CORPUS_ROWS, CORPUS_SEED, args.crowding, args.wrong))
    # The tokenizer is the built-in model's at all rates, so that models differ in nothing but their corpus.
    built_in = examples_of(flawed_problems(min(CORPUS_ROWS, 20_000), CORPUS_SEED))
    with TemporaryDirectory() as folder:  # save_model copies config and tokenizer from here
        train_tokenizer([example.prompt + example.response for example in built_in], Path(folder))
        rows, _, _ = encode_examples(corpus, load_tokenizer(folder), CONFIG.max_position_embeddings)
        model = new_model(Path(folder), CORPUS_SEED).to(args.device)
        train(model, pretraining_loss, rows, args.steps, args.lr, args.out)
        finish(model, args.out)
    return 0


if __name__ == "__main__":
    cli.run_script(main)
