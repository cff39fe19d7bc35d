"""Make `tests/golden/greedy.json`: greedy continuations by transformers of a batch of padded prompts.

Run `python tests/make_generation_values.py [name ...]` after make_golden.py, in an environment with minibalora and
transformers, which the package itself never imports. Without names, all models are made. Prompts are drawn until no
choice is nearly a tie, because another order of summing could decide a tie differently.
"""

import json
import sys

import torch
from helpers import GOLDEN, LANGUAGE_MODELS, SEQ2SEQ, restless
from make_golden import auto_class_of

# transformers has no DeepSeek-MoE
MODELS = [name for name in (*LANGUAGE_MODELS, *SEQ2SEQ) if not name.startswith("deepseek")]
LENGTHS = (11, 4, 7, 1)  # of the prompts
NEW_TOKENS = 24  # more than mistral_window's window of 5; 11 + 24 fit into gpt2's 40 positions
PADDING = 0  # prompts never have this token


@torch.no_grad()
def greedy(name: str) -> dict:
    """Return prompts, an EOS that ends at least one of their continuations early, and the continuations without EOS."""
    model = auto_class_of(name).from_pretrained(GOLDEN / name, dtype=torch.float32, attn_implementation="eager")
    restless(model.eval())
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(2, 61, (length,), generator=generator).tolist() for length in LENGTHS]
        free, scores = continued(model, prompts, eos=None)
        best_two = scores.topk(2).values  # (steps, B, 2)
        margin = ((best_two[..., 0] - best_two[..., 1]) / scores.abs().max()).min().item()
        candidates = [  # for EOS: first used after 6 to 17 tokens of row 1, and missing in another row
            token for token in free[1] if free[1].index(token) in range(6, 18) and any(token not in row for row in free)
        ]
        if margin < 1e-3 or not candidates:
            continue
        eos = candidates[0]
        rows, _ = continued(model, prompts, eos)
        rows = [row[: row.index(eos)] if eos in row else row for row in rows]
        print(f"{name}: seed {seed}, smallest margin {margin:.1e} of scale, lengths {[len(row) for row in rows]}")
        return {"prompts": prompts, "eos_id": eos, "continuations": rows}
    raise SystemExit(f"{name}: no seed gives clear choices; the last has margin {margin:.1e} of scale, texts {free}")


def continued(model, prompts: list[list[int]], eos: int | None) -> tuple[list[list[int]], torch.Tensor]:
    """Return the new ids of each prompt (the batch is left-padded), and the logits (steps, B, V) that gave them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PADDING] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=eos,
        pad_token_id=PADDING,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=not model.config.is_encoder_decoder,  # transformers' cache needs as many encoder as decoder layers
    )
    start = 1 if model.config.is_encoder_decoder else width  # T5 returns its start token and the answer only
    return out.sequences[:, start:].tolist(), torch.stack(out.logits)


def main() -> None:
    path = GOLDEN / "greedy.json"
    values = json.loads(path.read_text()) if sys.argv[1:] else {}
    values |= {name: greedy(name) for name in sys.argv[1:] or MODELS}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
