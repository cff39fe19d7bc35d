"""The methods of --method, each an adapter and its start, and the rule that any --recipe goes with any of them."""

import argparse
from collections.abc import Callable

from minibalora.base import cli
from minibalora.base.cli import positive_int, positive_rate, rate, share_below_one
from minibalora.base.errors import InputError
from minibalora.objective import Objective
from minibalora.variants import VARIANTS

# Method -> the kinds of --init that it can have, the first by default. "full" has no adapter.
STARTS = {"full": (), "lora": ("lora",), "pissa": ("pissa",), "ba-lora": ("pissa", "lora", "olora")}
STARTS |= {"dora": ("lora", "pissa", "olora"), "adalora": ("lora",), "loha": ("lora",), "dylora": ("lora",)}
STARTS |= {"deltalora": ("lora",), "olora": ("olora",), "rslora": ("lora", "pissa", "olora")}
STARTS |= {"lora+": ("lora", "pissa", "olora")}
METHODS = tuple(STARTS)
SETTINGS = {name: defaults for name, (_, defaults) in VARIANTS.items()} | {"lora+": {"ratio": 16.0}}

ADAPTER_FLAGS = ("rank", "alpha", "init", "init_cache", "targets", "adapter_rank", "method_settings")
TERM_FLAGS = ("lambda1", "lambda2", "lambda3", "svd_k", "temperature", "top_k", "adaptive_lambda1")
WITHOUT = {  # method -> flags that it can't have, and why
    "dora": {
        "fsdp": "whose start needs the norms of whole weights",
        "adapter_rank": "whose change in the weights has full rank",
    },
    "dylora": {"compile": "which would be compiled again for every rank that it draws"},
    "full": {"plain": "whose layers and loss are plain", "quantize": "which trains the weights"},
}


def add_method_flags(add: Callable, recipes: dict[str, Objective]) -> None:
    """Add --method, its settings, and --recipe. add: a group's add_argument."""
    add("--method", choices=METHODS, default="ba-lora", help="adapter and its start. full: none, all weights train "
        "but a mixture's routers; ba-lora: pissa with a recipe; lora, pissa, olora: minibalora/lowrank.py; the others: "
        "minibalora/variants.py (default: ba-lora)")  # fmt: skip
    add("--method-settings", nargs="+", metavar="NAME=VALUE", help="adalora: target (average rank at the end; default: "
        "2/3 of --rank), warm and final (shares of the steps before and after the ranks fall; 0.1, 0.5), every (steps "
        "between two cuts; 10), orthogonality (weight of its penalty; 0.5). dylora: frozen (true: of the drawn rank, "
        "only the last row learns; false). deltalora: ratio (weight of what W takes over; 2), warm (share of the steps "
        "before; 0.1). lora+: ratio (of B's learning rate to A's; 16)")  # fmt: skip
    add("--recipe", choices=("none", *sorted(recipes)), help="terms to add to the loss, with any adapter: none, or "
        "those of a version of the paper, which the flags below change; the plan of a run "
        "warns of a term that can't help (default: iclr2026 with ba-lora, otherwise none)")  # fmt: skip


def settle_recipe(flags: dict) -> None:
    """Replace flags["recipe"] by the name of a recipe, or by None if no terms are added."""
    if flags["method"] == "ba-lora":
        if flags["recipe"] == "none":
            raise InputError("--recipe none has no meaning with --method ba-lora, which is pissa with a recipe: give "
                             "--method pissa")  # fmt: skip
        flags["recipe"] = flags["recipe"] or "iclr2026"
    elif flags["recipe"] == "none":
        flags["recipe"] = None


def refuse_contradictions(flags: dict) -> None:
    """Refuse flags that the method, its start or its recipe can't have. `settle_recipe` comes first."""
    method = flags["method"]
    for name in ADAPTER_FLAGS if method == "full" else ():
        if flags[name] is not None:
            raise InputError(f"{cli.flag(name)} has no meaning with --method full: leave one out")
    for name, why in WITHOUT.get(method, {}).items():
        if flags.get(name):  # train_nlu.py lacks some of them
            raise InputError(f"{cli.flag(name)} has no meaning with --method {method}, {why}: leave one out")
    _refuse_terms(flags)
    if flags["init"] and flags["init"].partition("_")[0] not in STARTS[method]:
        raise InputError(f"--init {flags['init']} contradicts --method {method}: leave one out")
    if flags["init_cache"] is not None:
        start, flag = STARTS[method][0], f"--method {method}"
        if flags["init"]:
            start, flag = flags["init"], f"--init {flags['init']}"
        if not start.startswith("pissa") or start.startswith("pissa_niter"):
            raise InputError(f"--init-cache keeps the SVDs of pissa and pissa_krylov_N, not of {flag}: leave one out")


def _refuse_terms(flags: dict) -> None:
    """Refuse terms without a teacher, and changes to a recipe that is not there."""
    method = flags["method"]
    for name in ("recipe", "non_target_kl"):
        if method == "full" and flags[name]:
            flag = f"--recipe {flags[name]}" if name == "recipe" else "--non-target-kl"
            raise InputError(f"{flag} needs a teacher, which --method full overwrites: use an adapter method")
    for name in TERM_FLAGS:
        if flags["recipe"] is None and flags.get(name) is not None:
            mend = "leave it out" if method == "full" else "add --recipe 2024 or iclr2026"
            raise InputError(f"{cli.flag(name)} changes a recipe, and --method {method} has none: {mend}")
    if flags["adaptive_lambda1"] and flags["lambda1"] == 0:
        raise InputError("--adaptive-lambda1 has no meaning with --lambda1 0: leave one out")


def settings_of(method: str, texts: list[str] | None, rank: int) -> dict:
    """Return the settings of a method by name: its defaults and those of --method-settings, texts "name=value".

    Raises InputError for a setting that the method does not have, a wrong value, a setting that is given twice, a
    budget of AdaLoRA that is not below the rank, and shares of the steps that leave none.
    """
    defaults, chosen = SETTINGS.get(method, {}), {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if name not in defaults:
            has = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise InputError(f"--method-settings {text}: --method {method} has no setting {name!r}: {has}")
        if name in chosen:
            raise InputError(f"--method-settings {text}: {name} is given twice: leave one out")
        try:
            chosen[name] = KINDS[name](value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--method-settings {text}: {error}: give {name}=VALUE, see --help") from None
    if method == "adalora" and rank == 1:
        raise InputError("--rank 1 leaves --method adalora no value to leave out: give a higher rank")
    if chosen.get("target", 0) >= rank:
        raise InputError(f"--method-settings target={chosen['target']}: not below --rank {rank}: give 1 to {rank - 1}")
    settings = defaults | chosen
    warm, final = settings.get("warm", 0.0), settings.get("final", 0.0)
    if warm + final >= 1:
        raise InputError(f"--method-settings warm={warm:g} final={final:g}: shares of the steps: give a sum below 1")
    return settings


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text == "true"


KINDS = {"target": positive_int, "every": positive_int, "warm": share_below_one, "final": share_below_one}
KINDS |= {"orthogonality": rate, "ratio": positive_rate, "frozen": _switch}
