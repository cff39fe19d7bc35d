"""Extract the program from a completion: the code of the answer, without drafts, prose and other code blocks."""

import ast
import re
import textwrap
import warnings
from threading import Lock

# Where a chat model's turn or a text ends. `generate` never writes these; other programs leave them in.
END_MARKS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<eos>")
END_MARKS += ("<end_of_turn>", "<|EOT|>", "<｜end▁of▁sentence｜>", "<|return|>")

_TAG = "think|thinking|thoughts?|reasoning|seed:think"
THOUGHTS = re.compile(rf"<({_TAG})>.*?</\1>|\[THINK\].*?\[/THINK\]|◁think▷.*?◁/think▷", re.DOTALL | re.IGNORECASE)
THOUGHTS_END = re.compile(rf"</(?:{_TAG})>|\[/THINK\]|◁/think▷", re.IGNORECASE)
THOUGHTS_BEGIN = re.compile(rf"<(?:{_TAG})>|\[THINK\]|◁think▷", re.IGNORECASE)

# Demonstrations that a model adds. They are not judged: a wrong one must not fail a correct function.
OWN_TESTS = re.compile(r"^(?:assert\b|if __name__ ?==|# Example usage)", re.MULTILINE)  # in what is not Python
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FUTURE = re.compile(r"^from __future__ import +(?:\([^)]*\)|[^\n(]*)", re.MULTILINE)

# ``` may follow prose on its line; ~~~ may not. The text after the fence is its info string: python, {.python}, ...
OPENING = re.compile(r"^(?P<before>(?:(?!```).)*?)(?P<fence>`{3,}|(?<![^\s>])~{3,})(?P<info>[^`\n]*)$", re.MULTILINE)
TAG = re.compile(r"^\[(?:BEGIN|DONE|/?PYTHON)\][ \t]*\r?$", re.MULTILINE)  # fences in MBPP's and Code Llama's prompts
BULLET = re.compile(r"\s*(?:(?:[-*+]|[0-9]+[.)])\s+)?")
SENTENCE = re.compile(r"^(?!(?:from|import|async def|def|class)\b)[^\s#@)\]}]", re.MULTILINE)
STATEMENT = re.compile(r"^(?:from|import|async def|def|class|@)\b", re.MULTILINE)
DEMONSTRATING = ("input", "print", "exit", "quit", "main", "testmod", "__name__")  # names in what is not the solution
MOST_ENDS = 200  # lines at which code may end before prose
HELPERS = (*KEPT, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.If, ast.Try)

PARSING = Lock()  # catch_warnings is not safe in several threads


def without_thoughts(completion: str) -> str:
    """Return a completion without the text between <think> and </think>.

    A closing tag alone ends thoughts that the prompt began; an opening tag alone begins thoughts that never end.
    """
    text = THOUGHTS.sub("", completion)
    text = text[max((match.end() for match in THOUGHTS_END.finditer(text)), default=0) :]
    return THOUGHTS_BEGIN.split(text, maxsplit=1)[0]


def code_of(completion: str, names: tuple[str, ...] = (), before: str = "") -> str:
    """Return the code of a completion: the Markdown blocks that define one of `names`, and their helpers.

    Blocks with only imports, definitions and constants are helpers. If no block defines a name, returns the first
    block that continues `before`, the prompt's own code, or else the first block. A completion without fences is code
    as a whole; if its first fence only closes, it begins with code. The model's own tests are left out.
    """
    text = TAG.sub("```", without_thoughts(completion).removeprefix("\ufeff"))
    fence = OPENING.search(text)
    if fence is None or _is_code(text, names, before):  # a docstring may have fences
        return _without_tests(_without_prose(text, names, before), names, before)
    head = text[: fence.start("fence")]
    if not fence["info"].strip() and _is_code(head, names, before):  # the prompt opened this fence
        blocks = [head, *_blocks(text[fence.end() :])]
    else:
        blocks = _blocks(text)
    pieces = [_without_prose(_unindented(block, names), names, before) for block in blocks]
    blocks = [_without_tests(piece, names, before) for piece in pieces]
    definitions = [block for block in blocks if defines(block, names)]
    complete = [block for block in definitions if _parsed(block)] or definitions
    if complete:
        chosen = [block in complete or _is_helper(piece, names) for piece, block in zip(pieces, blocks, strict=True)]
        return "\n".join(block for block, is_chosen in zip(blocks, chosen, strict=True) if is_chosen)
    if defines(head, names):
        return _without_tests(_without_prose(head, names, before), names, before)
    return next((block for block in blocks if block.strip() and _parsed(before + block)), blocks[0])


def program_of(before: str, code: str, after: str) -> str:
    """Return before + code + after with all __future__ imports at the top, where Python requires them."""
    body = f"{before}{code}"
    imports = "".join(f"{match[0].rstrip()}\n" for match in FUTURE.finditer(body))
    return f"{imports}{FUTURE.sub('', body)}\n{after}"


def defined_names(code: str) -> set[str]:
    """Return the names of functions, classes and variables that code defines at its top level."""
    tree = _parsed(code)
    if tree is None:
        return set(re.findall(r"^(?:(?:async +)?def|class) +(\w+)", code, re.MULTILINE))
    return set().union(*map(_names, tree.body))


def _names(node: ast.stmt) -> set[str]:
    """Return the name of a function or class, or those of the variables that a statement assigns to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def defines(code: str, names: tuple[str, ...]) -> bool:
    return not defined_names(code).isdisjoint(names)


def _parsed(code: str) -> ast.Module | None:
    try:
        with PARSING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _blocks(text: str) -> list[str]:
    """Return the contents of a Markdown text's fenced blocks; the last one may lack its closing fence.

    As in CommonMark, a block ends at a fence that is at least as long as the opening fence and indented by at most
    three more columns, and its lines lose the opening fence's indentation. A fence with an info string also ends it.
    """
    blocks, fence, indent = [], "", 0
    for line in text.split("\n"):
        opening = OPENING.match(line)
        if not fence:
            if opening:
                fence, blocks = opening["fence"], [*blocks, []]
                indent = len(opening["before"]) if BULLET.fullmatch(opening["before"]) else 0
            continue
        content = line[min(indent, len(line) - len(line.lstrip(" \t"))) :]
        column = len(content) - len(content.lstrip(" \t"))
        if column <= 3 and content.strip().strip(fence[0]) == "" and content.strip().startswith(fence):
            fence = ""
        elif column <= 3 and opening and opening["info"].strip() and content.strip().startswith(fence):
            fence, blocks = opening["fence"], [*blocks, []]
        elif content.rstrip().endswith(fence) and content.strip() != fence:  # code and fence on one line
            blocks[-1].append(content.rstrip().removesuffix(fence))
            fence = ""
        else:
            blocks[-1].append(content)
    return ["".join(f"{line}\n" for line in lines) for lines in blocks]


def _is_code(text: str, names: tuple[str, ...], before: str) -> bool:
    """Return whether a text is valid Python and defines one of `names` or, if indented, continues `before`."""
    if text.lstrip("\r\n")[:1] in (" ", "\t"):
        return bool(text.strip()) and _parsed(before + text) is not None
    return defines(text, names) and _parsed(text) is not None


def _is_helper(block: str, names: tuple[str, ...]) -> bool:
    """Return whether a block only imports, defines and fills variables, without the use of `names` or input()."""
    tree = _parsed(block)
    if tree is None or not tree.body or not all(isinstance(node, HELPERS) for node in tree.body):
        return False
    imports = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    if any(alias.name in names for alias in imports):
        return False
    return all(isinstance(node, KEPT) or _used(node).isdisjoint((*names, "input")) for node in tree.body)


def _used(node: ast.AST) -> set[str]:
    """Return the names in a statement, and the last parts of dotted ones."""
    parts = list(ast.walk(node))
    attributes = {part.attr for part in parts if isinstance(part, ast.Attribute)}
    return attributes | {part.id for part in parts if isinstance(part, ast.Name)}


def _unindented(block: str, names: tuple[str, ...]) -> str:
    dedented = textwrap.dedent(block)
    return dedented if defines(dedented, names) and not _parsed(block) else block


def _without_prose(text: str, names: tuple[str, ...], before: str) -> str:
    """Remove sentences around code without a fence. A text that is code, or has no code, stays unchanged."""
    if _is_code(text, names, before):
        return text
    statement = STATEMENT.search(text)
    ends = [len(text), *(match.start() for match in reversed([*SENTENCE.finditer(text)][:MOST_ENDS]))]
    parts = (text[start:end] for start in (0, *([statement.start()] if statement else ())) for end in ends)
    return next((part for part in parts if _is_code(part, names, before)), text)


def _without_tests(code: str, names: tuple[str, ...], before: str) -> str:
    """Leave out what demonstrates or tests `names` behind their definition: asserts, prints, a main, what uses them."""
    tree, start = _parsed(code), 0
    if tree is None or not defines(code, names):
        tree, start = _parsed(before + code), len(before)
    nodes = [] if tree is None else tree.body
    last = max((i for i, node in enumerate(nodes) if not _names(node).isdisjoint(names)), default=None)
    if last is None:
        tests = OWN_TESTS.search(code)
        return code[: tests.start()] if tests else code
    lines, aside = re.findall(r"[^\n]*\n|[^\n]+", before[:start] + code), {*names, *DEMONSTRATING}
    for index, node in enumerate(nodes):
        if isinstance(node, KEPT):
            aside |= set() if _used(node).isdisjoint(aside) else _names(node)
        elif index > last and (isinstance(node, ast.Assert) or not _used(node).isdisjoint(aside)):
            aside |= _names(node)
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines)[start:]
