"""Text from a decoder: greedy, batched, with a KV cache."""

import torch

from minibalora.errors import InputError
from minibalora.models.decoder import Decoder, KVCache
from minibalora.text import Tokenizer


@torch.no_grad()
def generate(model: Decoder, tok: Tokenizer, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The most likely continuation of each prompt, up to EOS or max_new_tokens, decoded without the prompt.

    One batch: prompts of different lengths are padded on the right, and each gives the text that it gives alone; but
    with learned positions (GPT-2) all end where the longest prompt has reached the last one.
    """
    if not prompts:
        return []
    device, limit = model.embedding.weight.device, model.config.max_position_embeddings
    encoded = tok.encode_prompts(prompts)
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    width = int(lengths.max())
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded], device=device)
    if limit is not None:
        if width >= limit:
            raise InputError(f"a prompt has {width} tokens, but the model has {limit} positions: shorten it")
        max_new_tokens = min(max_new_tokens, limit - width)
    cache = KVCache(model.config, lengths, width + max_new_tokens, model.embedding.weight.dtype)

    hidden = model.hidden(input_ids, cache=cache)[torch.arange(len(prompts), device=device), lengths - 1]
    generated, finished = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        token = model.head(hidden).argmax(-1)  # (B,)
        generated.append(token)
        finished |= token == (-1 if tok.eos_id is None else tok.eos_id)
        if finished.all() or len(generated) == max_new_tokens:
            break
        hidden = model.hidden(token[:, None], cache=cache)[:, 0]
    return [tok.decode(_before(ids, tok.eos_id)) for ids in torch.stack(generated, dim=1).tolist()]


def _before(ids: list[int], eos_id: int | None) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
