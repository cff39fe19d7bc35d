"""The rule of --method and --recipe: any adapter with any terms, settings by name, and what can't be combined."""

from dataclasses import replace

import pytest

from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective
from minibalora.run.flags import parse_nlg_flags, parse_nlu_flags
from minibalora.run.methods import METHODS, SETTINGS
from minibalora.run.settings import Adaptation
from minibalora.variants import VARIANTS

CPU = ["--device", "cpu"]
PARSERS = [(parse_nlg_flags, NLG_RECIPES), (parse_nlu_flags, NLU_RECIPES)]
ADAPTERS = METHODS[1:]
OWN_START = [name for name in VARIANTS if name != "dora"]


@pytest.mark.parametrize("parse, recipes", PARSERS)
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_recipe_and_its_weights_go_with_every_adapter(method, parse, recipes):
    flags = [*CPU, "--method", method, "--non-target-kl", "0.5"]
    for name, recipe in recipes.items():
        expected = replace(recipe, lambda2=0.7, non_target_kl=0.5)
        settings = parse([*flags, "--recipe", name, "--lambda2", "0.7"])
        assert settings.objective == expected and settings.recorded["recipe"] == name
    if method != "ba-lora":
        without, none = parse(flags), parse([*flags, "--recipe", "none"])
        assert without.objective == none.objective == Objective(non_target_kl=0.5)
        assert without.recorded["recipe"] is none.recorded["recipe"] is None


def test_ba_lora_is_pissa_with_a_recipe():
    names = ["pissa", "ba-lora"]
    pissa, ba_lora = (parse_nlg_flags([*CPU, "--method", name, "--recipe", "iclr2026"]) for name in names)
    assert pissa.objective == ba_lora.objective == parse_nlg_flags(CPU).objective
    assert replace(pissa.adaptation, method="ba-lora") == ba_lora.adaptation == parse_nlg_flags(CPU).adaptation


@pytest.mark.parametrize("method", ADAPTERS)
def test_each_method_has_its_start_and_its_settings(method):
    adaptation = parse_nlg_flags([*CPU, "--method", method]).adaptation
    start = {"pissa": "pissa", "ba-lora": "pissa", "olora": "olora"}.get(method, "lora")
    alpha = 64 if method == "rslora" else 16  # s = 16 / √16
    assert adaptation == Adaptation(method, 16, alpha, start, settings=SETTINGS.get(method, {}))
    assert adaptation.rate_of_b == (16 if method == "lora+" else 1)


@pytest.mark.parametrize(
    "method, given, expected",
    [
        ("adalora", ["target=4", "warm=0", "every=5", "orthogonality=0"], [4, 0, 5, 0]),
        ("dylora", ["frozen=true"], [True]),
        ("deltalora", ["warm=0.25", "ratio=1"], [0.25, 1]),
        ("lora+", ["ratio=0.5"], [0.5]),
    ],
)
def test_settings_change_the_defaults(method, given, expected):
    settings = parse_nlu_flags([*CPU, "--method", method, "--method-settings", *given])
    chosen = {text.partition("=")[0]: value for text, value in zip(given, expected, strict=True)}
    assert settings.adaptation.settings == SETTINGS[method] | chosen
    assert settings.recorded["method_settings"] == given


def test_help_states_the_defaults_of_the_settings(capsys):
    with pytest.raises(SystemExit):
        parse_nlg_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for defaults in SETTINGS.values():
        for name, default in defaults.items():
            value = "2/3 of --rank" if default is None else f"{default:g}" if type(default) is float else str(default)
            assert name in text and value.lower() in text, name


@pytest.mark.parametrize("parse", [parse_nlg_flags, parse_nlu_flags])
@pytest.mark.parametrize(
    "method, flags, parts",
    [
        *[(method, ["--init", "pissa"], ["--init pissa", f"--method {method}"]) for method in OWN_START],
        *[(method, ["--init-cache", "c"], ["--init-cache", f"--method {method}"]) for method in METHODS[4:]],
        ("olora", ["--init", "lora"], ["--init lora", "--method olora"]),
        ("dora", ["--adapter-rank", "2"], ["--adapter-rank", "--method dora", "full rank"]),
        ("dylora", ["--compile"], ["--compile", "--method dylora", "rank"]),
        ("full", ["--method-settings", "ratio=2"], ["--method-settings", "--method full"]),
        ("full", ["--recipe", "2024"], ["--recipe 2024", "teacher"]),
        ("full", ["--lambda1", "1"], ["--lambda1", "--method full", "leave it out"]),
        ("dora", ["--lambda1", "1"], ["--lambda1", "--method dora", "--recipe 2024 or iclr2026"]),
        ("lora", ["--recipe", "none", "--temperature", "2"], ["--temperature", "--method lora"]),
        ("lora", ["--method-settings", "ratio=2"], ["ratio", "--method lora", "it has none"]),
        ("dora", ["--method-settings", "target=2"], ["target", "--method dora", "it has none"]),
        ("dylora", ["--method-settings", "ratio=2"], ["'ratio'", "--method dylora", "it has frozen"]),
        ("dylora", ["--method-settings", "frozen=1"], ["frozen=1", "true or false"]),
        ("adalora", ["--method-settings", "target"], ["target", "target=VALUE"]),
        ("adalora", ["--method-settings", "target=0"], ["target=0"]),
        ("adalora", ["--method-settings", "warm=1"], ["warm=1"]),
        ("adalora", ["--method-settings", "every=2", "every=3"], ["every", "twice"]),
        ("adalora", ["--rank", "8", "--method-settings", "target=8"], ["target=8", "--rank 8", "1 to 7"]),
        ("adalora", ["--method-settings", "warm=0.6"], ["warm=0.6 final=0.5", "below 1"]),
        ("adalora", ["--rank", "1"], ["--rank 1", "--method adalora"]),
        ("lora+", ["--method-settings", "ratio=0"], ["ratio=0"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_method_cannot_have_is_refused_with_the_reason(parse, method, flags, parts, refuses):
    refuses(lambda: parse([*CPU, "--method", method, *flags]), *parts)


def test_dora_is_refused_with_sharded_weights(refuses):
    refuses(lambda: parse_nlg_flags([*CPU, "--method", "dora", "--fsdp"]), "--fsdp", "--method dora", "norms")


def test_a_pissa_start_of_a_variant_has_a_cache():
    flags = ["--method", "dora", "--init", "pissa_krylov_8", "--init-cache", "c"]
    assert parse_nlg_flags([*CPU, *flags]).adaptation.init == "pissa_krylov_8"
