"""Makes `tests/golden/greedy.json`: what transformers' greedy generate writes after a batch of padded prompts.

Needs transformers, which the project itself never imports: `python tests/make_generation_values.py` in an environment
that has it and minibalora, after make_golden.py; with names to make these only. The prompts are drawn so that no choice
is nearly a tie, which another order of summing would decide otherwise; that is checked here, once.
"""

import json
import sys

import torch
from helpers import GOLDEN, LANGUAGE_MODELS, SEQ2SEQ, restless
from make_golden import auto_class_of

MODELS = [name for name in (*LANGUAGE_MODELS, *SEQ2SEQ) if not name.startswith("deepseek")]  # not in transformers
LENGTHS = (11, 4, 7, 1)
NEW_TOKENS = 24  # beyond mistral_window's 5; 11 + 24 fit gpt2's 40
PADDING = 0  # not drawn


@torch.no_grad()
def greedy(name: str) -> dict:
    """Prompts, the EOS that ends one of them early, and what follows each, without EOS."""
    model = auto_class_of(name).from_pretrained(GOLDEN / name, dtype=torch.float32, attn_implementation="eager")
    restless(model.eval())
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(2, 61, (length,), generator=generator).tolist() for length in LENGTHS]
        free, scores = continued(model, prompts, eos=None)
        two = scores.topk(2).values  # (steps, B, 2)
        margin = ((two[..., 0] - two[..., 1]) / scores.abs().max()).min().item()
        once = [
            token for token in free[1] if free[1].index(token) in range(6, 18) and any(token not in row for row in free)
        ]
        if margin < 1e-3 or not once:
            continue
        rows, _ = continued(model, prompts, eos=once[0])
        rows = [row[: row.index(once[0])] if once[0] in row else row for row in rows]
        print(f"{name}: seed {seed}, smallest margin {margin:.1e} of scale, lengths {[len(row) for row in rows]}")
        return {"prompts": prompts, "eos_id": once[0], "continuations": rows}
    raise SystemExit(f"{name}: no seed gives clear choices; the last: margin {margin:.1e} of scale, texts {free}")


def continued(model, prompts: list[list[int]], eos: int | None) -> tuple[list[list[int]], torch.Tensor]:
    """New ids of each row of a batch padded on the left, and the logits (steps, B, V) that they were chosen from."""
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
        use_cache=not model.config.is_encoder_decoder,  # transformers' has no room for more decoder than encoder layers
    )
    start = 1 if model.config.is_encoder_decoder else width  # of T5 only the answer comes back, after its start token
    return out.sequences[:, start:].tolist(), torch.stack(out.logits)


def main() -> None:
    path = GOLDEN / "greedy.json"
    values = json.loads(path.read_text()) if sys.argv[1:] else {}
    values |= {name: greedy(name) for name in sys.argv[1:] or MODELS}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
