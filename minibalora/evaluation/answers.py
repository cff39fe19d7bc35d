# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
r"""Find the final answer of a mathematical text, and compare two answers. This file works copied alone.

`same_number` is for GSM8K, `same_answer` for MATH. Both compare the answers as written, with numbers as exact
fractions, and never calculate: 2+3 is not 5. If in doubt, two answers are different.
"""

import re
from fractions import Fraction
from itertools import accumulate

__all__ = ["final_answer", "normalize", "number", "same_answer", "same_number"]

MARKER, HASHES, BOXES = "The answer is:", "####", (r"\boxed", r"\fbox")  # MetaMathQA, GSM8K, MATH
FRAME = " \t\r\n*`"  # removed around an answer; includes Markdown's marks
FENCES = re.compile(r"(?:(?:[ \t\r>*`$]|\\[\[\]]|(?<=```)[a-z]+)*\n)+")  # lines in front that hold only delimiters
LONGEST, BRACKETS = 500, 60  # characters and opening brackets; a longer answer is compared as it stands

CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "－": "-", "，": ",", "．": ".", "％": "%", "＄": "$", "°": r"\degree ", "×": r"\times "}
    | {"·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup "}
    | {"²": "^2 ", "³": "^3 ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
    | {chr(ord("０") + digit): str(digit) for digit in range(10)}
)

N = r"(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)"  # no zeros in front: (1,000) is not the pair (1,0)
ATOM = r"(?:[0-9A-Za-z]|\\(?:pi|theta)(?![A-Za-z]))"
FACTOR = r"(?:[0-9]|(?:\}|\^)\{[0-9]+\})"  # the end of a number, a fraction or a power
GROUP = r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"

# (pattern, replacement, reason), in this order. After Hendrycks et al. (arXiv 2103.03874, math_equivalence.py) and
# Lewkowycz et al. (Minerva, arXiv 2206.14858, appendix), but none deletes a word: \text{Monday} is not \text{Friday}.
REWRITES = [
    (r"\\\\(?:\[[0-9.]+[a-z]{2}\])?", r"\\cr ", "rows of a matrix, before other patterns see the two backslashes"),
    (r"\\(?:left|right)(?![A-Za-z])\.?|\\[Bb]igg?[lr]?(?![A-Za-z])|\\displaystyle", "", "size only"),
    (r"\\[cdt]frac(?![A-Za-z])", r"\\frac", "size only"),
    (r"(?<=[0-9])(?:\{,\}(?:\\!)?|,\\! *|\\!,|\\,)(?=[0-9]{3}(?![0-9]))", "", "thousands, also inside brackets"),
    (r"\\[ ,;:!]|~|\\q?quad(?![A-Za-z])|\s+", " ", "spaces"),
    (rf"\\\$ *({N})", r"\1 dollars ", "currency is a unit; only with a backslash: a bare $ begins mathematics"),
    (r"\\?\$|\\[()\[\]]", "", "delimiters of mathematics"),
    (r"\\(?:text|mbox|mathrm) *\{ *m *\}", " meters ", "a bare m is a variable"),
    (r"\\(?:text|textbf|textit|textrm|mbox|mathrm) *\{([^{}]*)\}", r" \1 ", "the words themselves stay"),
    (r"(?<![A-Za-z\\])(?:[A-Z](?=[a-z]{2})|N(?=o\b))", lambda match: match[0].lower(), "Even is even; A is not a"),
    (r"(?<=[0-9]) *\^ *\{? *(?:st|nd|rd|th)(?![A-Za-z]) *\}?", "", "ordinals"),
    (r"\^ *\{ *\\circ *\}|\^ *\\circ(?![A-Za-z])|\\degree(?![A-Za-z])", " degrees ", "degrees are a unit"),
    (r"\\?%", " percent ", "percent is a unit"),
    (r"\\(le|ge|ne)(?![A-Za-z])", r"\\\1q", "two names of one sign"),
    (r"[, ] *and ", ", ", 'a list; not "or", which changes the meaning of inequalities'),
    (r"(?<![A-Za-z])(?:square|sq\.?) ([a-z]+)", r"\1^2", "square feet"),
    (r"(?<![A-Za-z])cubic ([a-z]+)", r"\1^3", "cubic feet"),
    (r"([\^_]) *(-?[0-9]+|[A-Za-z]|\\[A-Za-z]+(?![A-Za-z]| *[{\[]))", r"\1{\2}", "x^10 is meant as x^{10}"),
    (rf"\\sqrt *({ATOM})", r"\\sqrt{\1}", "arguments get braces"),
    (rf"\\frac *({ATOM})", r"\\frac{\1}", "arguments get braces"),
    (rf"(\\frac *{GROUP}) *({ATOM})", r"\1{\2}", "arguments get braces"),
    (r"(?<![0-9./])([0-9]+) +([0-9]+) */ *([0-9]+)(?![0-9.])", r"\1\\frac{\2}{\3}", "mixed numbers still have a space"),
    (rf"({FACTOR} *)(?:\\times(?![A-Za-z])|\*)", r"\1\\cdot ", "the product of numbers, not of vectors"),
    (rf"({FACTOR} *)\\cdot *(?=[A-Za-z(]|\\pi|\\sqrt)", r"\1", r"but 2\cdot\frac{1}{2} is not 2\frac{1}{2}"),
    (r"(?<!\.)\. *$", "", "full stop"),
]
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement, _ in REWRITES]

# Bars separate the units, each with its words. No other word counts as a unit: 5 million or 5 less is not 5.
UNITS = """percent | degrees degree | radians radian | dollars dollar | cents cent | inches inch in | feet foot ft
| yards yard yd | miles mile mi | mph | millimeters millimeter mm | centimeters centimeter cm | meters meter metres
| kilometers kilometer km | grams gram | kilograms kilogram kg | pounds pound lbs lb | ounces ounce oz | tons ton
| liters liter | gallons gallon | cups cup | seconds second sec | minutes minute min | hours hour hr | days day
| weeks week | months month | years year | units unit | per | points point | people | students student | ways | integers
| digits digit | numbers | meals | edges | balls | books | games | pieces | apples"""
UNITS = {word: words.split()[0] for words in UNITS.split("|") for word in words.split()}
UNIT = re.compile(rf"(?<![A-Za-z\\])(?:(?:{'|'.join(UNITS)})(?![A-Za-z])(?: *\^\{{[23]\}})?[ ./]*){{1,6}}$")

QUANTITY = re.compile(r"(?=.*(?:[0-9]|\\pi))(?:[-0-9.,+/^{}() ]|\\(?:frac|sqrt|pi|cdot|pm)(?![A-Za-z]))+")
LABEL = re.compile(r" *((?:[A-Za-z]|\\[A-Za-z]+)(?:_\{\w\})?(?: *\( *[A-Za-z] *\))?) *(?:=|\\in(?![A-Za-z]))([^=<>]+)")
SPACED = re.compile(r"(?<![0-9.,/])[1-9][0-9]{0,2}(?:[ '’][0-9]{3})+(?![0-9]| */)")  # 1 234 and 1'234
BY_METER = re.compile(r"(?<=[0-9]) *[kcm]?m(?:\^\{[23]\}|/(?:s|h|min))(?![A-Za-z])")  # m^2, km/h; m is a variable
BOLD = re.compile(r"<(b|i|u|em|strong)>([^<>]*)</\1>", re.IGNORECASE)
THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|[0-9.] (?=[0-9.]))| ")  # the first two need their space
OPENING, CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
MATRIX = re.compile(r"\\begin\{[pb]matrix\}((?:(?!\\begin|\\end).)*)\\end\{[pb]matrix\}")
SYMBOL = r"\\pi|\\sqrt\{[0-9]+\}|[A-Za-z]"
TERM = re.compile(rf"([+-]?)({N})?({SYMBOL})?")
FRACTION = re.compile(rf"([+-]?)([0-9]+)?\\frac\{{([+-]?)({N})?({SYMBOL})?\}}\{{(-?)({N})\}}({SYMBOL})?")
SLASH = re.compile(rf"([+-]?)((?:{N})?(?:{SYMBOL})?)/({N})")
NUMERAL = re.compile(
    rf"(?<![\w.,/+-])(?:(^ *[+-] *|[+-]))?([0-9]*\\frac *{GROUP} *{GROUP}|{N}(?: */ *{N})?)"
    r"(?:[eE]([+-]?[0-9]{1,2})(?![0-9])|(?: *(thousand|million|billion|trillion)(?![A-Za-z])))?(?![A-Za-z](?![A-Za-z]))"
)
POWERS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CALCULATION = re.compile(r"[+*^<>\\]|(?<![A-Za-z])-|-(?![A-Za-z])|/ *[A-Za-z](?![A-Za-z])")


def final_answer(text: str) -> str | None:
    r"""Return the text after the last "The answer is:", or else after "####" or in \boxed{}, whichever comes last.

    Lines before it that hold only delimiters are skipped. The answer ends with its line, or with a matrix that begins
    there. A box is replaced by its content, and a full stop and dollar signs are removed. Returns None if there is no
    marker or the box does not end, "" if nothing follows.
    """
    _, marker, tail = text.rpartition(MARKER)
    if not marker:
        start = max(map(text.rfind, (HASHES, *BOXES)))
        if start < 0:
            return None
        tail = text[start:].removeprefix(HASHES)
    tail = tail.strip()
    if fences := FENCES.match(tail):
        tail = tail[fences.end() :]
    line = _first_line(tail)
    start = max(map(line.rfind, BOXES))
    if start >= 0:
        line = _boxed(tail[start:])
    if line is None:
        return None
    line = BOLD.sub(r"\2", line)
    parts = {part.strip() for part in line.split(HASHES) if re.search("[0-9]", part)}
    line = parts.pop() if len(parts) == 1 else line  # the model wrote 18 #### 18
    line = re.sub(r"(?<!\\)(?:(?:\bUS)?\$|\\[()\[\]])", "", line).strip(FRAME)
    return line if line.endswith("..") else line.removesuffix(".").strip(FRAME)


def _first_line(text: str) -> str:
    lines, matrices = [], 0
    for line in text.split("\n"):
        lines.append(line)
        matrices += line.count(r"\begin{") - line.count(r"\end{")
        if matrices <= 0:
            break
    return "\n".join(lines)


def _boxed(text: str) -> str | None:
    r"""Return the content of the \boxed{...} or \boxed ... at the start of the text; None if it does not end."""
    text = re.sub(r"^\\[a-z]+\s*", "", text)
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0]
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[1 : brace.start()]
    return None


def number(answer: str) -> Fraction | None:
    r"""Return the number in a text such as 1,234, -$5.50, \frac{3}{4}, 1 1/2, 12 apples, 5%, 2.5 million, 6 * 3 = 18.

    Returns None if there is no number, or a calculation, or several numbers without "=" before the last. A percent
    sign is ignored, as in the published scripts; see `benchmarks.judge_rounded`.
    """
    text = _rewritten(answer)
    if text is None:
        return None
    text = SPACED.sub(lambda match: re.sub("[ '’]", "", match[0]), BY_METER.sub("", re.sub("[€£] ?", "", text)))
    text = UNIT.sub("", _joined(text)).rpartition("=")[2]
    numeral = NUMERAL.search(text)
    if numeral is None:
        return None
    sign, digits, power, word = numeral.groups()
    rest = text[: numeral.start()] + " " + text[numeral.end() :]
    term = _term(f"{sign or ''}{digits}".replace(" ", ""))
    if CALCULATION.search(rest) or any(map(str.isnumeric, rest)) or term is None or term[1]:
        return None
    return term[0] * Fraction(10) ** (POWERS[word] if word else int(power or 0))


def same_number(answer: str | None, reference: str | None) -> bool:
    """Return whether both texts have a number and the two numbers are exactly equal."""
    ours, expected = (None if text is None else number(text) for text in (answer, reference))
    return ours is not None and ours == expected


def normalize(latex: str) -> str:
    """Return the normal form of an answer, without `x =` in front and without the unit.

    Fractions are reduced, decimals become fractions, sets and unions are sorted, and elements of brackets and cells of
    matrices are normalised too. An answer longer than LONGEST or with more than BRACKETS brackets stays as it is.
    """
    return _parts(latex)[0]


def same_answer(answer: str | None, reference: str | None) -> bool:
    """Return whether two answers have one normal form and no conflicting units or names: 5 cm is 5, but not 5 in."""
    if answer is None or reference is None:
        return False
    (form, *marks), (other, *other_marks) = _parts(answer), _parts(reference)
    return form == other != "" and all(a == b or not a or not b for a, b in zip(marks, other_marks, strict=True))


def _rewritten(answer: str) -> str | None:
    text = answer.translate(CHARACTERS)
    if len(text) > LONGEST or sum(map(text.count, "([{")) > BRACKETS:
        return None
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _joined(text: str) -> str:
    """Remove the comma in 1,234, but not inside brackets: (1,234) is a pair."""
    return text if re.search(r"[(\[]|\\\{", text) else THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _parts(latex: str) -> tuple[str, str, str]:
    r"""Return normal form, name and unit: `x = 0.5 cm` has \frac{1}{2}, x and centimeters."""
    text = _rewritten(latex)
    if text is None:
        return " ".join(latex.split()), "", ""
    label = LABEL.fullmatch(text)
    name, text = (label[1].replace(" ", ""), label[2]) if label else ("", text)
    unit = UNIT.search(text)
    if unit and QUANTITY.fullmatch(text[: unit.start()]):
        text, words = text[: unit.start()], re.findall("[a-z]+|[23/]", unit[0])
    else:
        words = []
    return _form(SPACE.sub(r"\1", _joined(text).strip())), name, " ".join(UNITS.get(word, word) for word in words)


def _form(text: str) -> str:
    text = text.strip()
    if matrix := MATRIX.fullmatch(text):
        rows = [",".join(map(_form, _split(row, "&"))) for row in _split(matrix[1], r"\cr") if row.strip()]
        return rf"\begin{{matrix}}{';'.join(rows)}\end{{matrix}}"
    parts = _split(text, r"\cup")
    if len(parts) > 1:
        return r"\cup ".join(sorted(map(_form, parts)))
    opening, inner, closing = _brackets(text)
    parts = _split(inner, ",")
    if opening + closing == "()" and len(parts) == 1:
        return _form(inner)
    if opening == r"\{" or len(parts) > 1:
        parts = map(_form, parts)
        return opening + ",".join(sorted(parts) if opening == r"\{" else parts) + closing
    return _element(text)


def _brackets(text: str) -> tuple[str, str, str]:
    """Return opening bracket, content and closing bracket if they enclose all of text, else "", text and ""."""
    tokens, depths = _tokens(text)
    if len(tokens) > 1 and tokens[0] in ("(", "[", r"\{") and min(depths[:-1]) == 1 and depths[-1] == 0:
        return tokens[0], "".join(tokens[1:-1]), tokens[-1]
    return "", text, ""


def _split(text: str, separator: str) -> list[str]:
    """Split a text at the separators that are outside of all brackets."""
    parts = [""]
    for token, depth in zip(*_tokens(text), strict=True):
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _element(text: str) -> str:
    term = _term(text)
    if term is None:
        return text.removeprefix("+")
    value, symbol = term
    sign, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    digits = str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"
    return sign + ("" if symbol and digits == "1" else digits) + (symbol if value else "")


def _term(text: str) -> tuple[Fraction, str] | None:
    r"""Return coefficient and symbol ("" for a number) of 1.50, 2\pi, 3x/4, \frac{\sqrt{3}}{2} or 1\frac{1}{2}."""
    if slash := SLASH.fullmatch(text):
        text = rf"{slash[1]}\frac{{{slash[2]}}}{{{slash[3]}}}"
    if (term := TERM.fullmatch(text)) and (term[2] or term[3]):
        sign, top, symbol = term.groups()
        return Fraction(sign + (top or "1")), symbol or ""
    fraction = FRACTION.fullmatch(text)
    if not fraction:
        return None
    sign, whole, sign_above, top, above, sign_below, bottom, behind = fraction.groups()
    if not (top or above) or (above and behind) or Fraction(bottom) == 0:
        return None
    value = Fraction(top or "1") / Fraction(bottom)
    if whole:
        if above or behind or sign_above or sign_below or value >= 1:
            return None
        value += int(whole)
    negative = (sign, sign_above, sign_below).count("-") % 2
    return (-value if negative else value), above or behind or ""


def _tokens(text: str) -> tuple[list[str], list[int]]:
    """Return commands and characters, and the number of open brackets after each (intervals mix the kinds)."""
    tokens = re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL)
    return tokens, list(accumulate((token in OPENING) - (token in CLOSING) for token in tokens))
