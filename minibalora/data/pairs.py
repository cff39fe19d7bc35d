"""Read a row's prompt, its response and the text that the prompt is about, by the field names of published collections.

A null field counts as absent: concatenated sets have null wherever a row lacks a column.
"""

from minibalora.base.errors import InputError
from minibalora.data.files import text_of

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
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
CHOICES = ("choices", "options")  # MMLU's, RACE's
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
        present = ", ".join(f"{name} (null)" if value is None else str(name) for name, value in row.items()) or "none"
        raise InputError(
            f"{where}: has fields {present}, none of {pairs}: rename yours, or name them to train_nlg.py "
            "with --prompt-field, --response-field"
        )
    if row.get("history"):
        raise InputError(f"{where}: has earlier turns in 'history': write the row as a conversation in 'messages'")
    refuse_media(row, where)
    names = INPUTS if input_field is None else (input_field,) if input_field else ()
    system, inputs = (
        [
            field_text(row, name, where)
            for name in group
            if name not in fields and row.get(name, absent) not in (*EMPTY, row.get(fields[0]))
        ]
        for group, absent in ((SYSTEMS, None), (names, input_field))  # a row without the named field is refused
    )
    question = "\n\n".join([*filter(str.strip, system), field_text(row, fields[0], where)])
    text = "\n".join(filter(str.strip, inputs))
    if prompt_field is None:
        refuse_missing_choices(row, f"{question}\n{text}", where)
    response = "" if row.get(fields[1], "") is None else field_text(row, fields[1], where)  # null: an empty cell
    return question, text, response


def refuse_missing_choices(row: dict, prompt: str, where: str) -> None:
    """Raise InputError if the prompt lacks the answers to choose from."""
    for name in CHOICES:
        if not all(choice in prompt for choice in _choices(row.get(name))):
            raise InputError(f"{where}: the prompt lacks the answers to choose from in {name!r}: write them into the "
                             "prompt, and name its field with --prompt-field")  # fmt: skip


def _choices(value: object) -> list[str]:
    """Return the texts in a list or object of choices, or a text itself."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value or ""]
    return [text for value in values for text in (_choices(value) if isinstance(value, dict | list) else [str(value)])]


def refuse_media(row: dict, where: str) -> None:
    """Raise InputError if a row is about more than text."""
    if media := [name for name in MEDIA if row.get(name)]:
        raise InputError(f"{where}: has {media[0]!r}: only texts can be learned from, leave the row out")


def field_text(row: dict, field: str, where: str) -> str:
    """Return a field that is a text, or a number as text. Raises InputError for anything else."""
    if field not in row:
        raise InputError(f"{where}: the field {field!r} is missing: add it or name another")
    cure = "make it a text, or name other fields (--prompt-field, --input-field, --response-field)"
    return text_of(row[field], f"the field {field!r}", where, cure)
