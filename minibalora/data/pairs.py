"""Read a row's prompt, its response and the text that the prompt is about, by the field names of published collections.

A null field counts as absent: concatenated sets have null wherever a row lacks a column.
"""

import re

from minibalora.base.errors import InputError
from minibalora.data.files import in_short, text_of

# The fields of prompt and response. The first pair that a row has counts.
FIELDS = [
    ("query", "response"),  # MetaMathQA
    ("instruction", "output"),  # Alpaca, Evol-Instruct, the PiSSA data set
    ("instruction", "response"),  # Dolly, GPTeacher, Magicoder
    ("query", "answer"),  # CodeFeedback
    ("question", "answer"),  # GSM8K
    ("question", "response"),  # OpenOrca
    ("problem", "solution"),  # MATH, NuminaMath
    ("problem", "generated_solution"),  # OpenMathInstruct
    ("prompt", "completion"),
    ("inputs", "targets"),  # FLAN, Aya
]
# What the prompt is about: Alpaca's, Dolly's, those of sets of questions about a text.
INPUTS = ("input", "context", "article", "passage", "document", "story", "question")
# Texts of many meanings: they are not joined to a prompt, and a row whose prompt lacks one is refused.
BESIDE = {
    *("text", "table", "tables", "paragraph", "paragraphs"),
    *("passages", "contexts", "documents", "schema", "attachments"),
}
HISTORIES = ("history", "chat_history")
MEDIA = re.compile(r"(image|img|video|audio)s?(_(path|file|byte)s?)?|pixel_values", re.IGNORECASE)
MEDIA_MARK = re.compile("<(image|video|audio)>")  # where a prompt is about a file
MEDIA_FILE = re.compile(r".*\.(png|jpe?g|webp|gif|bmp|tiff?|mp4|avi|mov|webm|mkv|wav|mp3|flac|ogg|m4a)", re.IGNORECASE)
# MMLU's, RACE's, HellaSwag's; in columns of their own: A, opa (MedMCQA's), option_1, distractor1 (SciQ's)
CHOICES = re.compile(
    r"choices|options|endings|candidates|[A-J]|op[a-e]|(option|choice|ending|candidate|distractor)_?([A-Ja-j]|\d)"
)
EMPTY = (None, "", [], {})
SYSTEMS = ("system_prompt", "system")  # OpenOrca's, put before the prompt


def pair_fields(row: dict) -> tuple[str, str] | None:
    """Return the first pair of FIELDS that the row has, best one without a blank text; a null response is the last
    resort. None: no pair. Concatenated sets have blank texts, too, wherever a row lacks a column."""
    pairs = [pair for pair in FIELDS if row.get(pair[0]) is not None and pair[1] in row]
    has_texts = {pair: all(str(row[name] or "").strip() for name in pair) for pair in pairs}
    return max(pairs, key=lambda pair: (has_texts[pair], row[pair[1]] is not None), default=None)


def read_pair(
    row: dict,
    where: str,
    prompt_field: str | None = None,
    response_field: str | None = None,
    input_field: str | None = None,
) -> tuple[str, str, str]:
    """Return the prompt (after the system prompt, if any), the text that it is about ("": none), and the response.

    Fields that are not named are recognised: FIELDS, INPUTS. input_field "": none. Raises InputError, which begins with
    `where`, if a field is missing or is not a text.
    """
    recognised = pair_fields(row) or (None, None)
    fields = prompt_field or recognised[0], response_field or recognised[1]
    if None in fields:
        pairs = ", ".join("/".join(pair) for pair in FIELDS)
        present = in_short(f"{name} (null)" if value is None else name for name, value in row.items())
        raise InputError(
            f"{where}: has fields {present}, none of {pairs}: rename yours, or name them to train_nlg.py "
            "with --prompt-field, --response-field"
        )
    if fields[1] in (fields[0], input_field):  # the model would learn to repeat its prompt
        raise InputError(f"{where}: the field {fields[1]!r} is the response, and also the prompt or in it: name others "
                         "with --prompt-field, --input-field, --response-field")  # fmt: skip
    question, text = read_question(row, where, fields[0], fields[1], input_field, is_named=prompt_field is not None)
    response = "" if row.get(fields[1], "") is None else field_text(row, fields[1], where)  # null: an empty cell
    return question, text, response


def read_question(
    row: dict,
    where: str,
    field: str,
    response_field: str | None = None,
    input_field: str | None = None,
    is_named: bool = False,
) -> tuple[str, str]:
    """Return the prompt in a field, after the system prompt, if any, and the text that it is about ("": none).

    An instruction beside another question is the prompt, and the question is what it is about. is_named: the user chose
    the field, so it alone is the prompt. Raises InputError, which begins with `where`, if a field is not a text or if
    the prompt would lack something.
    """
    if earlier := [name for name in HISTORIES if row.get(name)]:
        raise InputError(f"{where}: has earlier turns in {earlier[0]!r}: write the row as a conversation in 'messages'")
    names = INPUTS if input_field is None else (input_field,) if input_field else ()
    instruction = str(row.get("instruction") or "").strip()
    if instruction and not is_named and instruction not in str(row.get(field)):
        field, names = "instruction", (*names, field)
    if field == "instruction" and input_field is None:
        names = (*names, "query", "problem")
    system, inputs = (
        [
            field_text(row, name, where)
            for name in dict.fromkeys(group)
            if name not in (field, response_field) and row.get(name, absent) not in (*EMPTY, row.get(field))
        ]
        for group, absent in ((SYSTEMS, None), (names, input_field))  # a row without the named field is refused
    )
    question = "\n\n".join([*filter(str.strip, system), field_text(row, field, where)])
    text = "\n".join(filter(str.strip, inputs))
    whole = f"{question}\n{text}"
    refuse_media(row, where, whole)
    if not is_named:
        _refuse_missing_choices(row, whole, where)
    others = BESIDE - {field, response_field} if input_field is None and not is_named else set()
    if lost := lacking(row, others, whole, str(row[field])):
        raise InputError(f"{where}: the prompt lacks the text in {lost[0]!r}: rename the field to 'context' or name it "
                         "with --input-field; --input-field '' leaves it out")  # fmt: skip
    return question, text


def lacking(row: dict, names: set[str], prompt: str, question: str) -> list[str]:
    """Return the fields of a row, among `names`, with a text that the prompt lacks; spaces do not count.

    A text that contains the question is not missing: it is the row in a template, as in Alpaca's `text`.
    """
    present = [name for name in row if name in names and row[name]]
    if not present:
        return []
    prompt, question = ("".join(text.split()) for text in (prompt, question))

    def lacks(text: str) -> bool:
        text = "".join(text.split())
        return text not in prompt and not (question and question in text)

    return [name for name in present if any(map(lacks, _choices(row[name])))]


def _refuse_missing_choices(row: dict, prompt: str, where: str) -> None:
    """Raise InputError if the prompt lacks the answers to choose from."""
    for name in filter(CHOICES.fullmatch, row):
        choices = row[name]
        if name == "candidates" and isinstance(choices, list) and any(isinstance(choice, dict) for choice in choices):
            continue  # Mix-Instruct's are the answers of other models, with their scores
        if not all(choice in prompt for choice in _choices(choices)):
            raise InputError(f"{where}: the prompt lacks the answers to choose from in {name!r}: write them into the "
                             "prompt, and name its field with --prompt-field")  # fmt: skip


def _choices(value: object) -> list[str]:
    """Return the texts in a list or object of choices, or a text itself."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value or ""]
    return [text for value in values for text in (_choices(value) if isinstance(value, dict | list) else [str(value)])]


def refuse_media(row: dict, where: str, text: str = "") -> None:
    """Raise InputError if a row is about more than text: by its fields, or by `<image>` in `text` and a file's name."""
    media = [name for name in filter(MEDIA.fullmatch, row) if row[name]]
    if MEDIA_MARK.search(text):
        media += [name for name, value in row.items() if isinstance(value, str) and MEDIA_FILE.fullmatch(value)]
    if media:
        raise InputError(f"{where}: has {media[0]!r}: only texts can be learned from, leave the row out")


def field_text(row: dict, field: str, where: str) -> str:
    """Return a field that is a text, or a number as text. Raises InputError for anything else."""
    if field not in row:
        raise InputError(f"{where}: the field {field!r} is missing: add it or name another")
    cure = "make it a text, or name other fields (--prompt-field, --input-field, --response-field)"
    return text_of(row[field], f"the field {field!r}", where, cure)
