"""Answer prompts on the command line: `python -m minibalora generate`."""

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from minibalora.base import cli, progress
from minibalora.base.errors import InputError
from minibalora.checkpoints import BUILT_IN
from minibalora.checkpoints.adapters import load_adapter
from minibalora.checkpoints.chat_template import ChatTemplate
from minibalora.checkpoints.template import ALPACA, Template, add_template_flags, choose_template, trained_template
from minibalora.checkpoints.tokenizer import Tokenizer, load_tokenizer
from minibalora.checkpoints.weights import load_model
from minibalora.data.chat import conversation_key
from minibalora.data.files import in_short, opened, read_rows
from minibalora.data.pairs import FIELDS
from minibalora.data.prompts import prompt_from
from minibalora.evaluation.decoding import Decoding, encode_prompts, generate_each
from minibalora.lowrank import merge
from minibalora.models import LanguageModel

DEFAULT = "the one that the adapter was trained with, else chat if the model has a chat template, else alpaca"
JSON = re.compile(rb'[{[]\s*[{"]')  # how an object, or a list of objects or texts, begins
PROMPT_FIELDS = tuple(dict.fromkeys(prompt for prompt, _ in FIELDS))


def main() -> int:
    args = parse_flags()
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, tuple(args.stop), args.seed)
    template = choose_template(args.template or trained_template(args.model, args.adapter), args.model, args.adapter)
    if args.template is None and template != ALPACA:
        print(f"template: {template}", file=sys.stderr)
    names, asked, prompts = map(list, zip(*read_prompts(args.prompt, args.file, template), strict=True))
    model, tok = load(args.model, args.adapter, args.dtype, args.device, template.chat)
    if not tok.eos_ids:
        print(f"{args.model} names no EOS: every answer has --max-new-tokens tokens", file=sys.stderr)
    encode_prompts(model, tok, prompts, names)  # refuse a prompt that does not fit before answering any
    if args.adapter is not None and args.dtype == torch.float32:
        merge(model)  # plain linears are faster, but in bfloat16, rounding the sum could erase a small change
    answers = generate_each(model, tok, prompts, decoding, args.batch_size)
    sys.stdout.reconfigure(encoding="utf-8")
    for question, text in zip(asked, in_order(answers), strict=True):
        is_alone = args.prompt and len(prompts) == 1
        line = text if is_alone else json.dumps({"prompt": question, "completion": text}, ensure_ascii=False)
        progress.say(line)
    return 0


def parse_flags() -> Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora generate",
        description="Answer prompts with a model, in the template that it was trained with.",
    )
    add_model_flags(parser)
    add = parser.add_argument_group("prompts (default: from standard input)").add_argument
    add("--prompt", metavar="TEXT", action="append", help="a prompt, whose answer is printed as it is; with "
        "several, the output is that of --file")  # fmt: skip
    add("--file", metavar="FILE", type=cli.path, help="file with a prompt per line, or a JSON object with one of the "
        f"fields {', '.join(PROMPT_FIELDS)}, or a conversation; -: standard input. The answers are JSON Lines with "
        "prompt and completion, in the same order")  # fmt: skip
    add_template_flags(parser.add_argument_group("template"), DEFAULT)
    add_decoding_flags(parser)
    add = parser.add_argument_group("end of an answer").add_argument
    add("--stop", nargs="+", action="extend", default=[], metavar="STRING",
        help="end an answer before any of these, and at EOS")  # fmt: skip
    args = parse(parser, max_new_tokens=512)
    if args.prompt is not None and args.file is not None:
        raise InputError("--prompt and --file are both given: leave one out")
    if "" in args.stop:
        raise InputError("--stop: the string is empty: leave it out")
    return args


def add_model_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR", type=cli.folder, default=BUILT_IN / "llama", help="checkpoint folder: config.json, "
        "tokenizer.json, *.safetensors (default: the built-in tiny LLaMA)")  # fmt: skip
    add(
        "--adapter",
        metavar="DIR",
        type=cli.folder,
        help="folder of an adapter for this model, from train_nlg.py or PEFT",
    )
    add("--batch-size", type=cli.positive_int, metavar="N", help="prompts per batch (default: 8)")
    cli.add_hardware_flags(add)


def add_decoding_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("decoding").add_argument
    add("--max-new-tokens", type=cli.positive_int, metavar="N", help="most tokens of an answer (default: 512; "
        "evaluate: 1024 with --task math or mt-bench, or a rounded --protocol)")  # fmt: skip
    add("--temperature", type=cli.rate, metavar="T", help="divide the logits by T; 0: always take the most "
        "likely token (default: 0)")  # fmt: skip
    add("--top-p", type=cli.number("a number above 0, up to 1", lambda value: 0 < value <= 1), metavar="P",
        help="draw from the smallest set of tokens with this probability (default: 1, all)")  # fmt: skip
    add("--seed", type=cli.natural, help="seed of the random tokens of --temperature (default: 42)")


def parse(parser: ArgumentParser, draws: bool = False, **defaults: object) -> Namespace:
    """Parse a command line with the model and decoding flags, and fill in their defaults.

    draws: whether tokens are drawn even without --temperature. Raises InputError for a flag that would have no effect.
    """
    parser.set_defaults(batch_size=8, temperature=0.0, top_p=1.0, seed=None, **defaults)
    args = parser.parse_args()
    for name, is_given in (("--top-p", args.top_p < 1), ("--seed", args.seed is not None)):
        if is_given and args.temperature == 0 and not draws:
            raise InputError(f"{name} has no meaning without --temperature: add it")
    args.seed = 42 if args.seed is None else args.seed
    cli.settle_hardware(args)
    return args


def load(
    folder: Path,
    adapter: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    chat: ChatTemplate | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """Load a model with its adapter, not merged, and its tokenizer for prompts in this chat template."""
    tok, model = load_tokenizer(folder, chat), load_model(folder, dtype=dtype, device=device)
    return model if adapter is None else load_adapter(model, adapter), tok


def read_prompts(texts: list[str] | None, file: Path | None, template: Template) -> list[tuple[str, object, str]]:
    """Return `prompt_of` each prompt in `texts`, or else in the file, or else on standard input.

    A file has a prompt per line; blank lines are skipped. A line that begins with `{"` is a JSON object, whose prompt
    may have newlines, and so is a file of one object. Rows of a Parquet file are read like such objects. Raises
    InputError if there is no prompt.
    """
    if texts is not None:
        return [prompt_of({"prompt": text}, "--prompt", template) for text in texts]
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("nothing to answer: give --prompt or --file")
    is_stdin = file in (None, Path("-"))
    source = "standard input" if is_stdin else str(file)
    if is_stdin:
        content = sys.stdin.buffer.read()
    else:
        with opened(file) as stream:
            content = stream.read()
    if content.startswith(b"PAR1") and not is_stdin:
        return [prompt_of(row, where, template) for _, where, row in read_rows(file)]
    prompts = []
    for number, line in enumerate(lines_of(content.removeprefix(b"\xef\xbb\xbf")), start=1):
        where = f"{source}, line {number}"
        try:
            text = line.decode().rstrip("\r")
            row = json.loads(text) if JSON.match(line) else {"prompt": text}
        except UnicodeDecodeError:
            raise InputError(f"{where}: not valid UTF-8: convert the file to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: broken JSON ({error}): mend the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON {type(row).__name__}: give an object or a plain prompt per line")
        if text.strip():
            prompts.append(prompt_of(row, where, template))
    if not prompts:
        raise InputError(f"{source}: has no prompts: give one per line")
    return prompts


def lines_of(content: bytes) -> list[bytes]:
    """Return the lines of a file of prompts; JSON that is written over all its lines counts as one."""
    try:
        if JSON.match(content):
            json.loads(content)
            return [content]
    except (ValueError, RecursionError):  # an object per line, or plain text
        pass
    return content.split(b"\n")


def prompt_of(row: dict, where: str, template: Template) -> tuple[str, object, str]:
    """Return `where`, the row's conversation or text in one of PROMPT_FIELDS, and the whole prompt in the template."""
    fields = conversation_key(row), *PROMPT_FIELDS
    field = next((field for field in fields if row.get(field) is not None), None)
    if field is None:
        raise InputError(f"{where}: has fields {in_short(row)}, none of {', '.join(PROMPT_FIELDS)}: rename one")
    asked = row[field] if field == fields[0] else str(row[field])
    return where, asked, prompt_from(row, where, field, template)


def in_order(answers: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Yield the texts in order of their indices, each as soon as all texts before it have arrived."""
    waiting, turn = {}, 0
    for index, text in answers:
        waiting[index] = text
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1
