"""Tokenizers: special tokens follow the checkpoint's files, and broken files are refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import minibalora as mb
from minibalora.checkpoints import tokenizer as text
from minibalora.checkpoints.template import choose_template, save_template
from minibalora.toy import MODEL

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "one": 4, "two": 5, "three": 6}
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def make(tmp_path):
    """make(settings, template) is a tokenizer of seven words, loaded from files as Hugging Face writes them."""

    def tokenizer(settings, template=None, **more):
        backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_special_tokens(SPECIALS)
        if template:
            ids = [("<s>", 1), ("</s>", 2)]
            pair = more.get("pair", "$A $B:1")
            backend.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=ids)
        if more.get("cut"):
            backend.enable_truncation(2)
            backend.enable_padding(length=8, pad_id=3, pad_token="<pad>")
        backend.save(str(tmp_path / "tokenizer.json"))
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return mb.load_tokenizer(tmp_path)

    return tokenizer


@pytest.mark.parametrize(
    "template, expected", [(None, [4, 5]), ("<s> $A", [1, 4, 5]), ("<s> $A </s>", [1, 4, 5, 2]), ("$A </s>", [4, 5, 2])]
)
@pytest.mark.parametrize("flag", [True, False, None])
def test_special_tokens_are_added_as_the_post_processor_says(make, template, expected, flag):
    """add_bos_token is ignored, as in transformers 5.23, if there is a tokenizer.json."""
    tok = make(NAMES | {"add_bos_token": flag, "add_eos_token": flag}, template)
    assert tok.encode("one two") == expected
    assert tok.encode_prompts(["one two", "three"])[0] == [token for token in expected if token != 2]
    assert tok.encode("") == [token for token in expected if token in (1, 2)]


def test_llama_s_fast_tokenizer_puts_bos_where_its_settings_alone_ask_for_it(make):
    """Transformers 4.46 did this with DeepSeek-MoE's files, whose tokenizer.json has no template."""
    asked = NAMES | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    assert make(asked, None).encode("one two") == make(asked, "<s> $A").encode("one two") == [1, 4, 5]
    assert make(asked, None).encode("one", "two") == [1, 4, 1, 5]
    assert make(asked | {"add_bos_token": False}, None).encode("one two") == [4, 5]


PAIRS = {"template": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1"}


def test_a_pair_is_joined_as_the_post_processor_says(make):
    tok = make(NAMES, **PAIRS)
    assert tok.encode("one", "two three") == [1, 4, 2, 5, 6, 2]
    assert tok.encode("one", "") == [1, 4, 2, 2] != tok.encode("one")


def test_labelled_texts_have_token_types(make):
    tok = make(NAMES, **PAIRS)
    rows, cut = tok.encode_labelled([("one",), ("one", "two three"), ("",)], max_length=6)
    assert rows == [([1, 4, 2], [0, 0, 0]), ([1, 4, 2, 5, 6, 2], [0, 0, 0, 1, 1, 1]), ([1, 2], [0, 0])]
    assert cut == 0
    assert tok.encode_labelled([], max_length=6) == ([], 0)


def test_the_longer_text_of_a_pair_is_cut_first(make):
    texts = [("one two three one",), ("one", "two three one two"), ("three two one", "two"), ("one two three",)]
    rows, cut = make(NAMES, **PAIRS).encode_labelled(texts, max_length=5)
    assert [ids for ids, _ in rows] == [[1, 4, 5, 6, 2], [1, 4, 2, 5, 2], [1, 6, 2, 5, 2], [1, 4, 5, 6, 2]]
    assert cut == 3


def test_cutting_is_off_again_afterwards_even_after_an_error(make):
    tok = make(NAMES, **PAIRS)
    tok.encode_labelled([("one two three",)], max_length=3)
    assert tok.encode("one two three") == [1, 4, 5, 6, 2]
    with pytest.raises(TypeError):
        tok.encode_labelled([("one",), (4,)], max_length=3)
    assert tok.encode("one two three") == [1, 4, 5, 6, 2]


@pytest.mark.parametrize("texts, specials", [([("one",)], 2), ([("one",), ("one", "two")], 3)])
def test_a_length_without_room_for_text_is_refused(make, refuses, texts, specials):
    tok = make(NAMES, **PAIRS)
    assert tok.encode_labelled(texts, max_length=specials + 1)
    for length in (specials, 0, -1):
        refuses(
            lambda length=length: tok.encode_labelled(texts, length),
            f"length of {length}",
            f"{specials} special tokens",
        )


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_a_prompt_keeps_an_eos_of_its_own(make, template):
    bos = [1] if template else []
    assert make(NAMES, template).encode_prompts(["one </s>", "one"]) == [[*bos, 4, 2], [*bos, 4]]


def test_a_continuation_gets_no_special_token(make):
    tok = make(NAMES, "<s> $A </s>")
    assert tok.encode_responses(["one two", ""]) == [[4, 5], []]


@pytest.mark.parametrize("spell", [str, lambda token: {"content": token, "lstrip": False, "special": True}])
def test_special_tokens_are_named_by_strings_or_objects(make, spell):
    tok = make({"bos_token": spell("<s>"), "eos_token": spell("</s>"), "pad_token": spell("<pad>")})
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 3)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (None, (None, None, 0)),
        ({}, (None, None, 0)),
        ({"bos_token": None, "eos_token": "</s>"}, (None, 2, 2)),
        ({"bos_token": "<s>", "pad_token": "<unk>"}, (1, None, 0)),
        ({"eos_token": "</s>", "pad_token": None}, (None, 2, 2)),
    ],
)
def test_a_model_may_lack_special_tokens(make, settings, expected):
    tok = make(settings)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == expected


def test_decoding_leaves_special_tokens_out(make):
    tok = make(NAMES)
    assert tok.decode([1, 4, 5, 2, 3, 3]) == "one two"
    assert tok.decode([]) == ""


def test_a_continuation_keeps_the_space_that_decoding_drops_in_front():
    """Like LLaMA 2's tokenizer; otherwise, the first line of a Python function would lose one of its four spaces."""
    pieces = ["<unk>", "▁def", ":", "<0x0A>", "▁▁▁", "▁return", *(f"<0x{byte:02X}>" for byte in "é".encode())]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tok = text.Tokenizer(backend, {}, Path("here"))
    assert tok.decode([4, 5]) == "   return"
    for prompt in ([1, 2, 3], [6, 7] * 9 + [1, 2, 3], [2]):
        assert tok.decode_after(prompt, [4, 5]) == "    return"
        assert tok.decode_after(prompt, []) == ""
    assert tok.decode_after([], [1]) == "def"
    assert tok.decode_after([7] + [6, 7] * 4, [2]) == ":"  # the context begins inside a character


def test_truncation_and_padding_of_the_file_are_off(make):
    tok = make(NAMES, cut=True)
    assert tok.encode("one two three") == [4, 5, 6]
    assert tok.encode_prompts(["one two three", "one"]) == [[4, 5, 6], [4]]


@pytest.mark.parametrize("text", ["", " ", "Tom's 12 apples\n\n### cost €3,50 …", "naïve 🤖 日本語\t\\n{x}"])
def test_the_built_in_tokenizer_gives_text_back(text):
    tok = mb.load_tokenizer(MODEL)
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode(text)[0] == tok.bos_id


def test_a_missing_tokenizer_is_refused(tmp_path, refuses):
    refuses(lambda: mb.load_tokenizer(tmp_path), tmp_path / "tokenizer.json", "save_pretrained")
    for absent in ("absent", "x" * 300):
        refuses(lambda absent=absent: mb.load_tokenizer(tmp_path / absent), tmp_path / absent, "no such folder")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"\xff", b'{"model": {"type": "nonsense"}}', b"[" * 10_000]
)
def test_a_broken_tokenizer_is_refused(tmp_path, refuses, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    refuses(lambda: mb.load_tokenizer(tmp_path), tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"bos_token": "<start>"}, "<start>"),
        ({"eos_token": 2}, "2"),
        ({"eos_token": {"content": "<end>"}}, "<end>"),
        ([], "list"),
    ],
)
def test_wrong_settings_are_refused(make, tmp_path, refuses, settings, part):
    refuses(lambda: make(settings), tmp_path / "tokenizer_config.json", part)


def test_broken_settings_are_refused(make, tmp_path, refuses):
    make(None)
    (tmp_path / "tokenizer_config.json").write_text("{")
    refuses(lambda: mb.load_tokenizer(tmp_path), tmp_path / "tokenizer_config.json", "JSON")


def test_without_tokenizer_config_the_ids_of_config_json_count(make, tmp_path):
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}')
    tok = make(None)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 3)


@pytest.mark.parametrize(
    "files, eos_id, eos_ids",
    [
        ({"special_tokens_map.json": {"eos_token": "</s>"}}, 2, {2}),
        (
            {"special_tokens_map.json": {"eos_token": {"content": "</s>"}}, "config.json": {"eos_token_id": [4]}},
            2,
            {2, 4},
        ),
        (
            {
                "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {}},
                "special_tokens_map.json": {"eos_token": "<pad>"},
            },
            2,
            {2},
        ),
        ({"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "</s>"}}, 2, {2}),
        ({"generation_config.json": {"eos_token_id": [4, 5]}, "config.json": {"eos_token_id": 2}}, 4, {2, 4, 5}),
        ({"tokenizer_config.json": NAMES, "generation_config.json": {"eos_token_id": 5}}, 2, {2, 5}),
        ({"config.json": {"eos_token_id": [2, 4]}}, 2, {2, 4}),
        ({"config.json": {"eos_token_id": -1}, "generation_config.json": {"eos_token_id": None}}, None, set()),
    ],
)
def test_every_end_of_text_that_a_file_names_counts(make, tmp_path, files, eos_id, eos_ids):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tok = make(None)
    assert tok.eos_id == eos_id and tok.eos_ids == eos_ids


def test_a_special_token_of_which_two_files_disagree_is_refused(make, tmp_path, refuses):
    """Transformers takes the map's, unless there is an added_tokens_decoder."""
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "two"}, "pad_token": "three"}')
    refuses(lambda: make(NAMES), tmp_path / "tokenizer_config.json", "eos_token is '</s>'", "'two' in special_tokens")
    assert make({"eos_token": "two", "pad_token": "<pad>"}).eos_id == 5  # no result depends on the padding token


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", [2, None], True, {"id": 2}])
def test_an_end_of_text_that_is_not_a_number_is_refused(make, tmp_path, refuses, name, value):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    refuses(lambda: make(None), tmp_path / name, "eos_token_id", repr(value))


def test_a_bos_that_the_tokenizer_denies_is_not_used(make, tmp_path):
    """Qwen 2.5's config.json names a BOS, and its tokenizer_config.json has null."""
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    tok = make({"bos_token": None})
    assert tok.bos_id is None and tok.eos_id == 2


@pytest.mark.parametrize(
    "name", ["../../escaped", "a/b/c", "/etc/x", "", ".", ".hidden", "a b", "a\0", "x" * 300, 5, None]
)
def test_a_chat_template_s_name_that_is_no_file_name_is_refused(tmp_path, refuses, name):
    """When a model is saved, the name becomes a file's."""
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    refuses(lambda: choose_template(None, tmp_path), tmp_path / "tokenizer_config.json", repr(name), "rename")


def test_a_chat_template_may_have_any_plain_name(tmp_path):
    names = ["default", "tool_use", "v1.2-rag", "größe"]
    templates = [{"name": name, "template": "x"} for name in names]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    (tmp_path / "saved").mkdir()
    save_template(choose_template(None, tmp_path), tmp_path / "saved")
    assert choose_template(None, tmp_path / "saved").chat.texts.keys() == set(names)


@pytest.mark.parametrize("text", ["", " \n", [{"name": "default", "template": ""}]])
def test_an_empty_chat_template_is_refused(tmp_path, refuses, text):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    refuses(lambda: choose_template(None, tmp_path), tmp_path / "tokenizer_config.json", "is empty", "--template")


CHATML = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
LLAMA2 = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
ADDED = {"7": {"content": "<|im_end|>", "special": True}}


@pytest.mark.parametrize(
    "template, settings, end", [(CHATML, {"added_tokens_decoder": ADDED}, 7), (LLAMA2, {"eos_token": "three"}, 6)]
)
def test_a_token_that_only_tokenizer_config_json_makes_special_ends_a_reply(make, tmp_path, template, settings, end):
    """Transformers adds both: the second one is in the vocabulary, but not among tokenizer.json's added_tokens."""
    make(NAMES | {"chat_template": template} | settings)
    chat = choose_template("chat", tmp_path).chat
    tok = mb.load_tokenizer(tmp_path, chat)
    assert end in tok.eos_ids and tok.encode(f"one{chat.end_of_turn}") == [4, end]


def test_an_end_of_turn_that_the_tokenizer_lacks_is_refused(make, tmp_path, refuses):
    template = "{% for m in messages %}{{ m.content }}{{ pad_token }}{% endfor %}"
    make(NAMES | {"pad_token": "<end>", "chat_template": template})
    chat = choose_template("chat", tmp_path).chat
    refuses(lambda: mb.load_tokenizer(tmp_path, chat), tmp_path, "ends a reply with '<end>'", "not in the tokenizer")


CHAT, CALL = ({"content": name, "special": True, "normalized": False} for name in ("<|im_end|>", "<call>"))


@pytest.mark.parametrize(
    "settings, old",
    [
        ({"added_tokens_decoder": {"8": CALL, "7": CHAT}}, {}),
        ({"added_tokens_decoder": {"8": CALL, "7": CHAT}, "additional_special_tokens": ["<call>", "<|im_end|>"]}, {}),
        (
            {"additional_special_tokens": ["<call>"], "extra_special_tokens": {"end": CHAT}},
            {"<call>": 8, "<|im_end|>": 7},
        ),
    ],
)
def test_added_tokens_of_other_files_are_not_cut(make, tmp_path, settings, old):
    (tmp_path / "added_tokens.json").write_text(json.dumps(old))
    tok = make(NAMES | settings)
    assert tok.encode("one<|im_end|>two <call>") == [4, 7, 5, 8]
    assert tok.decode([4, 7, 5, 8]) == "one two"


@pytest.mark.parametrize(
    "settings, token",
    [
        ({"added_tokens_decoder": {"9": CHAT}}, "<|im_end|>"),
        ({"added_tokens_decoder": {"4": CHAT}}, "<|im_end|>"),
        ({"added_tokens_decoder": {"7": CHAT, "9": CALL}}, "<call>"),
        ({"additional_special_tokens": ["<|im_end|>"]}, "<|im_end|>"),
        ({"extra_special_tokens": {"end_token": "<|im_end|>"}}, "<|im_end|>"),
    ],
)
def test_an_added_token_without_its_place_in_tokenizer_json_is_refused(make, tmp_path, refuses, settings, token):
    refuses(lambda: make(settings), tmp_path / "tokenizer.json", repr(token), "added_tokens")


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"7": "x"}},
        {"added_tokens_decoder": {"x": CHAT}},
        {"added_tokens_decoder": {"7": {"content": 5}}},
        {"added_tokens_decoder": [CHAT]},
        {"additional_special_tokens": 5},
        {"additional_special_tokens": [5]},
        {"extra_special_tokens": [{}]},
    ],
)
def test_added_tokens_of_another_form_are_refused(make, tmp_path, refuses, settings):
    refuses(lambda: make(settings), tmp_path, "added tokens", "tokenizer_config.json")


def test_a_special_token_that_only_the_map_names_is_not_cut(make, tmp_path, refuses):
    """As if tokenizer_config.json named it."""
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|im_end|>"]}')
    refuses(lambda: make(NAMES), tmp_path / "tokenizer.json", "<|im_end|>", "added_tokens")
    assert make(NAMES | {"added_tokens_decoder": {}})  # beside this key, transformers does not read the map


def test_tokenizer_config_json_decides_how_a_known_token_is_found(make):
    """As in transformers 5.24: added_tokens_decoder takes precedence over tokenizer.json."""
    backend = make(NAMES | {"added_tokens_decoder": {"2": {"content": "</s>", "single_word": True}}}).backend
    assert backend.encode("one </s> one</s>two").ids[:3] == [4, 2, 4]
    assert 2 not in backend.encode("one</s>two").ids
    assert backend.decode([4, 2]) == "one"  # eos_token is special, whatever the entry says


BERT = json.loads((MODEL.parent / "bert" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("kind", ["BertTokenizer", "BertTokenizerFast", None])
@pytest.mark.parametrize(
    "settings", [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_a_setting_that_contradicts_bert_s_tokenizer_json_is_refused(tmp_path, refuses, kind, settings):
    """Transformers takes the setting, except for a general class of tokenizer."""
    (tmp_path / "tokenizer.json").write_bytes((MODEL.parent / "bert" / "tokenizer.json").read_bytes())

    def load(**changes):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(BERT | {"tokenizer_class": kind} | changes))
        return mb.load_tokenizer(tmp_path)

    refuses(lambda: load(**settings), tmp_path / "tokenizer_config.json", *settings, "False", "True in tokenizer.json")
    load(strip_accents=None, tokenize_chinese_chars=True)
    load(strip_accents=True)  # what null means for a tokenizer that lower-cases
    load(**settings, tokenizer_class="PreTrainedTokenizerFast")


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "RobertaTokenizer"])
def test_a_space_in_front_that_tokenizer_json_does_not_add_is_refused(tmp_path, refuses, kind):
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())

    def load(**settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return mb.load_tokenizer(tmp_path)

    refuses(lambda: load(tokenizer_class=kind, add_prefix_space=True), tmp_path, "add_prefix_space", "tokenizer.json")
    load(tokenizer_class=kind, add_prefix_space=False)
    load(tokenizer_class="LlamaTokenizerFast", add_prefix_space=True)  # transformers ignores it, too


def test_splitting_special_tokens_is_refused(make, tmp_path, refuses):
    refuses(lambda: make({"split_special_tokens": True}), tmp_path / "tokenizer_config.json", "split_special_tokens")
    make({"split_special_tokens": False})
