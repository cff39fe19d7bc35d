"""Final answers: extract them from a text, and compare them."""

import json
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from helpers import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from minibalora.evaluation import answers
from minibalora.evaluation.answers import final_answer, normalize, number, same_answer, same_number

PAIRS = [json.loads(line) for line in (GOLDEN / "math_pairs.jsonl").read_text("utf8").splitlines()]
# Pieces of answers, so that hypothesis tries the rows of the tables and not only letters.
PIECES = (
    r"""\frac \dfrac \sqrt \text{ \mbox{ \left( \right) \left[ \boxed{ \fbox \begin{pmatrix} \end{pmatrix} \\ \cup \{ \}
\pi \infty \cdot \times \pm ^ _ ^\circ { } ( ) [ ] , {,} \! \, \% % \$ $ = x= & / - + . 0 1 2 12 1,000 0.5 .5 e9 1e99 cm
dollars million and square th Monday The #### − ½ ² ０ 五 √ \ """.split()
    + [" ", "\n", "\\ ", "The answer is: "]
)
texts = st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
fractions = st.fractions(max_denominator=10**6)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['answer']} | {pair['reference']}")
def test_same_answer_does_not_depend_on_the_order(pair):
    answer, reference, equal = pair["answer"], pair["reference"], pair["equal"]
    assert same_answer(answer, reference) is equal, (normalize(answer), normalize(reference))
    assert same_answer(reference, answer) is equal


@pytest.mark.parametrize(
    "text, answer",
    [
        ("7 + 5 = 12\n#### 12\nThe answer is: 12", "12"),
        ("#### 1,234", "1,234"),
        ("so we get\n#### -7 ", "-7"),
        ("The answer is: $18.", "18"),
        ("The answer is: $18$.", "18"),
        (r"The answer is: \$18.", r"\$18"),
        ("The answer is: 18 dollars.", "18 dollars"),
        ("The answer is: 3\nThe answer is: 1,200.", "1,200"),
        ("The answer is: 5\nand more.\nThe end", "5"),
        ("The answer is:\n5\n", "5"),
        ("The answer is:7", "7"),
        ("The answer is:\n\\[\n\\boxed{18}\n\\]", "18"),
        ("The answer is: $$\n18\n$$", "18"),
        ("The answer is:\n```latex\n\nx+1\n```", "x+1"),
        ("**The answer is:**\n18", "18"),
        (
            "The answer is:\n\\[\n\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}\n\\]",
            "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
        ),
        ("The answer is:\n\\[\n\\]", ""),
        ("The answer is: **42**.", "42"),
        (r"The answer is: \(x+1\).", "x+1"),
        (r"The answer is: \[x+1\]", "x+1"),
        ("The answer is: 0.333...", "0.333..."),
        ("The answer is: 3.5.", "3.5"),
        ("The answer is:", ""),
        ("The answer is: .", ""),
        (r"The answer is: \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        (r"The answer is: $\boxed{12}$ or so", "12"),
        ("The answer is: $\\boxed{\n12\n}$", "12"),
        ("The answer is: 5\nbecause \\boxed{7}", "5"),
        ("\\boxed{7}, so\nThe answer is: 5", "5"),
        ("The answer is: 5\n#### 6", "5"),
        (r"First \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a{b{c}}d} and {", "a{b{c}}d"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{4}", "4"),
        (r"so $\boxed 5$.", "5"),
        (r"so $\boxed \frac{1}{2}$.", r"\frac{1}{2}"),
        (r"cut off at \boxed{\frac{1}{2", None),
        (r"The answer is: \boxed{\frac{1}{2", None),
        ("#### 3\nso \\boxed{4}", "4"),
        ("\\boxed{4}\n#### 3", "3"),
        (
            "The answer is: \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}.\nDone.",
            "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
        ),
        ("The answer is: US$5.", "5"),
        ("The answer is: 18 #### 18", "18"),
        ("The answer is: 18 #### 20", "18 #### 20"),
        ("The answer is: <b>18</b>", "18"),
        ("The answer is 5", None),  # as in the paper: without the colon, the sentence may be anywhere
        ("the answer is: 5", None),
        ("twelve", None),
        ("", None),
    ],
)
def test_final_answer_follows_the_last_marker(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("reference", ["11111111100", "11,111,111,100", r"11,\!111,\!111,\!100"])
def test_thousands_of_math_may_have_a_space_after_the_comma(reference):
    assert same_answer(r"11,\! 111,\! 111,\! 100", reference)
    assert not same_answer(r"11,\! 111,\! 111,\! 10", "1111111110")


@pytest.mark.parametrize(
    "answer, value",
    [
        ("18", "18"),
        ("1,234", "1234"),
        ("2,520,000", "2520000"),
        ("-47", "-47"),
        ("−5", "-5"),
        ("+5", "5"),
        ("- 5", "-5"),
        ("$18", "18"),
        (r"\$18", "18"),
        ("-$5.50", "-11/2"),
        ("$-5", "-5"),
        ("-€5", "-5"),
        ("£1,000.00", "1000"),
        ("18 dollars.", "18"),
        ("5%", "5"),
        (r"12.5\%", "25/2"),
        ("0.125", "1/8"),
        (".5", "1/2"),
        ("3.", "3"),
        ("3.0", "3"),
        ("3/4", "3/4"),
        ("-3/4 cup", "-3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac34", "-3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-3/2"),
        (r"2\frac{1}{3}", "7/3"),
        ("1½", "3/2"),
        ("12 apples", "12"),
        ("12cm", "12"),
        ("12 cm^2", "12"),
        ("Janet makes $18 a day", "18"),
        ("9 * 2 = 18", "18"),
        ("x = 5", "5"),
        ("2.5 million", "2500000"),
        ("$3 thousand", "3000"),
        ("1.2e3", "1200"),
        ("12e-1", "6/5"),
        ("10{,}000", "10000"),
        (r"10,\!000", "10000"),
        ("１２", "12"),
        ("(5)", "5"),
        (r"\text{5 apples}", "5"),
        ("1 234", "1234"),
        ("1\u00a0234\u202f567 eggs", "1234567"),
        ("1'000", "1000"),
        ("18 m^2", "18"),
        ("18 m/s", "18"),
        ("18km/h", "18"),
    ],
)
def test_number_is_exact(answer, value):
    assert number(answer) == Fraction(value)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "-",
        ".",
        ",",
        "five",
        "五",
        "1/0",
        r"\frac{1}{0}",
        "1.2.3",
        "1,23",
        "12,3456",
        "10 - 4",
        "10-4",
        "5 - x",
        "x - 5",
    ]
    + [
        "3 or 4",
        "3 hours 20 minutes",
        "3:30",
        "5x",
        "5k",
        "2^3",
        "5²",
        r"5\pi",
        r"\sqrt{5}",
        "5 + x",
        "x/5",
        "5/x",
        "> 5",
        "5 m^4",
        "1 2345",
        "12'34",
    ]
    + ["1e999999999", "9" * 10**5, "1 2", "10^6", "5!6", "1/2/3", "½½", "007"],
)
def test_number_is_none_without_one_number(answer):
    assert number(answer) is None
    assert not same_number(answer, answer)


def test_same_number_is_not_rounded():
    assert same_number("1,200.00", "$1200") and same_number("0.5", "1/2")
    assert not same_number("3.6", "4") and not same_number("50%", "0.5") and not same_number(None, "4")


def test_no_answer_is_never_right():
    assert not same_answer(None, "5") and not same_answer("", "") and not same_answer("$ $", r"\text{}")


@given(texts, texts)
def test_any_text_gets_a_verdict_that_is_symmetric_and_reflexive(one, other):
    for text in (one, other):
        final_answer(text)
        assert same_answer(text, text) == (normalize(text) != "")
        assert same_number(text, text) == (number(text) is not None)
    assert same_answer(one, other) == same_answer(other, one)
    assert same_number(one, other) == same_number(other, one)


@given(texts)
def test_final_answer_finds_an_answer_after_any_text(text):
    assert final_answer(text + "\nThe answer is: 12") == "12"


@given(fractions, fractions)
def test_numbers_are_equal_if_and_only_if_their_values_are(a, b):
    spelt = rf"\frac{{{b.numerator}}}{{{b.denominator}}}"
    for same in (same_answer, same_number):
        assert same(str(a), spelt) == (a == b)
        assert same(str(a), rf"\frac{{{2 * a.numerator}}}{{{2 * a.denominator}}}")


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
def test_decimals_with_commas_have_their_value(digits, places):
    value = Fraction(digits, 10**places)
    spelt = f"{abs(digits) // 10**places:,}"
    if places:
        spelt += f".{abs(digits) % 10**places:0{places}}"
    assert number("-" * (digits < 0) + spelt) == value
    assert same_answer("-" * (digits < 0) + spelt, str(value))


@given(st.lists(fractions, min_size=2, max_size=5), st.randoms())
def test_the_order_counts_in_tuples_and_not_in_sets(values, random):
    shuffled = random.sample(values, len(values))
    one, other = (", ".join(map(str, row)) for row in (values, shuffled))
    assert same_answer(rf"\{{{one}\}}", rf"\{{{other}\}}")
    assert same_answer(f"({one})", f"({other})") == (values == shuffled)
    assert not same_answer(f"({one})", f"[{other}]")


@pytest.mark.parametrize(
    "piece",
    PIECES
    + [
        "(" * 3,
        r"\frac{",
        r"\frac{1}{",
        "^{",
        "1 ",
        "1,",
        ". ",
        "cm ",
        "1cm/",
        r"\boxed{{",
        "$x",
        r"\begin{",
        "\\",
        "9",
    ],
)
def test_long_texts_are_compared_quickly(piece):
    long = piece * (100_000 // len(piece))
    most = piece * (490 // len(piece))  # the longest text that is read
    start = time.perf_counter()
    for text in (long, most, most + "!", "The answer is: " + long, "5" + most, r"\boxed{" + long):
        final_answer(text)
        number(text)
        same_answer(text, text + "1")
    assert time.perf_counter() - start < 1


def test_answers_copied_alone_works(tmp_path):
    shutil.copy(answers.__file__, tmp_path)
    code = "import answers; assert answers.same_answer('0.5', '1/2')"
    subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {code}"], cwd=tmp_path, check=True
    )
