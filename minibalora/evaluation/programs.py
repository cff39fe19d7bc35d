"""Extract the program from a completion: the code of the answer, without drafts, prose and other code blocks."""

import ast
import re
import textwrap
import warnings
from threading import Lock

# Where a chat model's turn or a text ends. `generate` never writes these; other programs leave them in.
END_MARKS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<eos>")
END_MARKS += ("<end_of_turn>", "<|EOT|>", "<｜end▁of▁sentence｜>", "<|return|>")
# In front of a text they end nothing: several models have one token for BOS and EOS.
FIRST_MARKS = (*END_MARKS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "[DONE]")
FIRST_MARKS = re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, FIRST_MARKS))}))+")

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
FENCE = re.compile(r"`{3,}|~{3,}")
TAG = re.compile(r"^\[(?:BEGIN|DONE|/?PYTHON)\][ \t]*\r?$", re.MULTILINE)  # fences in MBPP's and Code Llama's prompts
LANGUAGE = re.compile(r"\s*(?:python3?|py)[ \t]*\r?\n", re.IGNORECASE)  # what is left of a fence
BULLET = re.compile(r"\s*(?:(?:[-*+]|[0-9]+[.)])\s+)?")
SENTENCE = re.compile(r"^(?!(?:from|import|async def|def|class)\b)[^\s#@)\]}]", re.MULTILINE)
STATEMENT = re.compile(r"^(?:from|import|async def|def|class|@)\b", re.MULTILINE)
DEMONSTRATING = ("input", "print", "exit", "quit", "main", "testmod", "__name__")  # names in what is not the solution
MOST_ENDS = 200  # lines at which code may end before prose
HELPERS = (*KEPT, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.If, ast.Try)
PERHAPS = (ast.Lambda, ast.IfExp, ast.BoolOp, ast.If, ast.Try)  # what is in these may not be run

PARSING = Lock()  # catch_warnings is not safe in several threads


def without_thoughts(completion: str) -> str:
    """Return a completion without the text between <think> and </think>.

    A closing tag alone ends thoughts that the prompt began; an opening tag alone begins thoughts that never end.
    """
    text = THOUGHTS.sub("", completion)
    text = text[max((match.end() for match in THOUGHTS_END.finditer(text)), default=0) :]
    return THOUGHTS_BEGIN.split(text, maxsplit=1)[0]


def before_marks(text: str, marks: tuple[str, ...], is_program: bool) -> str:
    """Cut a text at the first of the marks that is not in its thoughts nor, in a program, in a string."""
    shown = THOUGHTS.sub(lambda match: "\n" * len(match[0]), text)
    if end := THOUGHTS_END.search(shown):  # of thoughts that the prompt began
        shown = "\n" * end.end() + shown[end.end() :]
    places = [match.start() for match in re.finditer("|".join(map(re.escape, marks)), shown)]
    cuts = (place for place in places if not (is_program and _is_in_string(shown, place, places)))
    return text[: next(cuts, len(text))]


def _is_in_string(text: str, place: int, places: list[int]) -> bool:
    """Return whether the code up to `place` only parses together with what follows, up to another place or a fence."""
    start = max((match.end() for match in re.finditer(rf"(?:{FENCE.pattern})[^\n]*\n", text[:place])), default=0)
    fence = FENCE.search(text, place)
    last = fence.start() if fence else len(text)
    head = "if True:\n" if text[start:place].lstrip("\r\n")[:1] in (" ", "\t") else ""  # it continues the prompt
    ends = [last, *(end for end in places if place < end < last)][:MOST_ENDS]
    return not _parsed(head + text[start:place]) and any(_parsed(head + text[start:end]) for end in ends)


def continues(text: str, before: str) -> bool:
    """Return whether a text, which may run on as prose or behind a fence, begins with code that continues `before`."""
    text = without_thoughts(text)
    parts = text, FENCE.split(text, maxsplit=1)[0]
    return any(_is_code(_without_prose(part, (), before), (), before) for part in parts)


def code_of(completion: str, names: tuple[str, ...] = (), before: str = "") -> str:
    """Return the code of a completion: the Markdown blocks that define one of `names`, and their helpers.

    Blocks with only imports, definitions and constants are helpers. If no block defines a name, returns the first
    block that continues `before`, the prompt's own code, or else the first block. A completion without fences is code
    as a whole; if its first fence only closes, it begins with code. The model's own tests and stubs are left out.
    """
    text = TAG.sub("```", without_thoughts(completion).removeprefix("\ufeff"))
    whole = text.lstrip()
    if STATEMENT.match(whole) and defines(whole, names) and not continues(text, before):
        text = whole  # behind the space of a tokenizer
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
    while len(complete) > 1 and _is_stub(complete[-1], names):  # one in front does no harm, and may have the imports
        complete.pop()
    if complete:
        return "\n".join(block for piece, block in zip(pieces, blocks, strict=True)
                         if block in complete or (block not in definitions and _is_helper(piece, names)))  # fmt: skip
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


def _is_stub(block: str, names: tuple[str, ...]) -> bool:
    """Return whether the bodies of all functions called one of `names` are only `pass`, `...` or a docstring."""
    nodes = [node for node in getattr(_parsed(block), "body", ()) if not _names(node).isdisjoint(names)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return functions == nodes != [] and all(_is_empty(part) for node in functions for part in node.body)


def _is_empty(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _used(node: ast.AST) -> set[str]:
    """Return the names in a statement, and the last parts of dotted ones."""
    parts = list(ast.walk(node))
    attributes = {part.attr for part in parts if isinstance(part, ast.Attribute)}
    return attributes | {part.id for part in parts if isinstance(part, ast.Name)}


def _demonstrates(node: ast.stmt, aside: set[str], names: tuple[str, ...]) -> bool:
    """Return whether a statement is an assert or uses names in `aside`. In f.limit = 2, the f is not used."""
    targets = node.targets if isinstance(node, ast.Assign) else [None]
    sets = all(isinstance(target, ast.Attribute) and getattr(target.value, "id", None) in names for target in targets)
    return isinstance(node, ast.Assert) or not _used(node.value if sets else node).isdisjoint(aside)


def _questions(nodes: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that are certain to call input(), which the tests do not give, and those that use it."""
    found, answers = [], set()
    if "input" in set().union(*map(_names, nodes)):  # not Python's own
        return []
    for node in nodes:
        parts = list(ast.walk(node))
        called = {getattr(part.func, "id", None) for part in parts if isinstance(part, ast.Call)}
        asks = "input" in called and not any(isinstance(part, PERHAPS) for part in parts)
        if not isinstance(node, KEPT) and (asks or not _used(node).isdisjoint(answers)):
            found.append(node)
            answers |= {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return found


def _unindented(block: str, names: tuple[str, ...]) -> str:
    dedented = textwrap.dedent(block)
    return dedented if defines(dedented, names) and not _parsed(block) else block


def _without_prose(text: str, names: tuple[str, ...], before: str) -> str:
    """Remove sentences around code without a fence. A text that is code, or has no code, stays unchanged."""
    text = text[match.end() :] if (match := LANGUAGE.match(text)) else text
    if _is_code(text, names, before):
        return text
    statement = STATEMENT.search(text)
    ends = [len(text), *(match.start() for match in reversed([*SENTENCE.finditer(text)][:MOST_ENDS]))]
    parts = (text[start:end] for start in (0, *([statement.start()] if statement else ())) for end in ends)
    return next((part for part in parts if _is_code(part, names, before)), text)


def _without_tests(code: str, names: tuple[str, ...], before: str) -> str:
    """Leave out what demonstrates or tests `names` behind their definition: asserts, prints, a main, what uses them.

    Before it, leave out what asks for input, and what uses that.
    """
    tree, start = _parsed(code), 0
    if tree is None or not defines(code, names):
        tree, start = _parsed(before + code), len(before)
    nodes = [] if tree is None else tree.body
    last = max((i for i, node in enumerate(nodes) if not _names(node).isdisjoint(names)), default=None)
    if last is None:
        tests = OWN_TESTS.search(code)
        return code[: tests.start()] if tests else code
    lines, aside = re.findall(r"[^\n]*\n|[^\n]+", before[:start] + code), {*names, *DEMONSTRATING}
    questions = [] if start else _questions(nodes[:last])
    for index, node in enumerate(nodes):
        if isinstance(node, KEPT):
            aside |= set() if _used(node).isdisjoint(aside) else _names(node)
        elif node in questions or (index > last and _demonstrates(node, aside, names)):
            aside |= _names(node)
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines)[start:]
