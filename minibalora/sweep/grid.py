"""Make the runs of a sweep from its command line: one for every combination of the flags' values."""

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from minibalora.base.cli import OneLineParser, flag
from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object, recorded_settings
from minibalora.run.flags import nlg_parser, nlu_parser, parse_nlg_flags, parse_nlu_flags
from minibalora.run.run_folder import check_settings
from minibalora.run.settings import Settings

SCRIPTS = {"train_nlg.py": (nlg_parser, parse_nlg_flags), "train_nlu.py": (nlu_parser, parse_nlu_flags)}
REFUSED = {"resume": "the sweep's own command, given again, continues unfinished runs"}
REFUSED |= {"features": "all runs would write the same file"}
CHANGE_NO_RESULT = {"out", "resume", "device", "save_every", "init_cache", "teacher_cache"}


@dataclass(frozen=True)
class PlannedRun:
    """One combination of values."""

    name: str  # of its folder
    argv: list[str]  # its flags, without --out
    given: dict  # the value of each flag in argv
    settings: dict  # all settings that can change the result, with the defaults filled in


def plan_runs(script: Path, argv: list[str], out: Path, tune_seeds: list[int] = ()) -> list[PlannedRun]:
    """Return the runs in the order of the parser's flags, the last of which varies fastest.

    A run that `out` holds already keeps the name of its folder. Where a folder of this name holds a run of other flags,
    the names have these flags as well. Raises InputError for wrong flags, for a combination that the script refuses, if
    two runs would share a folder, and if `out` holds another run there.

    tune_seeds: more values for --seed.
    """
    if script.name not in SCRIPTS or not script.is_file():
        raise InputError(f"{script}: no such script: give the path of train_nlg.py or train_nlu.py as the first word")
    make_parser, parse = SCRIPTS[script.name]
    alternatives = read_alternatives(make_parser(), argv)
    if tune_seeds:
        alternatives["seed"] = [["--seed", str(seed)] for seed in tune_seeds] + other_seeds(alternatives, tune_seeds)
    varied = [name for name, values in alternatives.items() if len(values) > 1]
    choices = [dict(zip(alternatives, values, strict=True)) for values in product(*alternatives.values())]
    runs = [planned(parse, choice, varied) for choice in choices]
    if differing := differing_flags(runs, out):
        runs = [planned(parse, choice, varied + differing) for choice in choices]
    existing = {
        fingerprint(recorded_settings(path.parent), runs[0].settings): path.parent.name
        for path in out.glob("*/run.json")
    }
    runs = [replace(run, name=existing.get(fingerprint(run.settings, run.settings), run.name)) for run in runs]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            count = f"{names.count(run.name)} runs would get the folder {out / run.name}"
            raise InputError(f"{count}: give values that make a difference, and each of them once")
        if os.path.exists(out / run.name / "run.json"):
            check_settings(out / run.name, run.settings, set())
    return runs


def read_alternatives(training: argparse.ArgumentParser, argv: list[str]) -> dict[str, list[list[str]]]:
    """Return the alternatives of each flag on the command line by its name, each as the words for the script.

    `--lr 1e-3 2e-3` and `--lr 1e-3 --lr 2e-3` are the same two alternatives. The values of a flag that takes several,
    such as --targets, are one alternative; repeat the flag for the next. A switch may be given the values off and on.
    """
    parser = OneLineParser("python -m minibalora sweep", "")
    actions = {action.dest: action for action in training._actions if action.dest not in ("help", "out")}
    for action in actions.values():
        values = {"nargs": "*", "choices": ("off", "on")} if action.nargs == 0 else {"nargs": "+"}
        parser.add_argument(action.option_strings[0], action="append", **values)
    given = {name: lists for name, lists in vars(parser.parse_args(argv)).items() if lists is not None}
    for name in REFUSED.keys() & given:
        raise InputError(f"{flag(name)} does not go with a sweep: {REFUSED[name]}: leave it out")
    return {name: split_alternatives(actions[name], lists) for name, lists in given.items()}


def other_seeds(alternatives: dict[str, list[list[str]]], tune_seeds: list[int]) -> list[list[str]]:
    """Return the alternatives of --seed. Raises InputError if there are none beside the tune seeds."""
    if "seed" not in alternatives:
        raise InputError("--tune-seeds: --seed is missing: give the seeds that count")
    for _, seed in alternatives["seed"]:
        if seed in map(str, tune_seeds):
            raise InputError(f"--seed {seed}: is one of --tune-seeds, which do not count: give other seeds")
    return alternatives["seed"]


def differing_flags(runs: list[PlannedRun], out: Path) -> list[str]:
    """Return the flags, of these runs and of other sweeps in `out`, that tell runs apart which would share a folder."""
    names, recorded = [], read_record(out)["runs"]
    for run in runs:
        there = recorded_settings(out / run.name)
        for name in run.given | recorded.get(run.name, {}) if there else ():
            if name in run.settings and there.get(name) != run.settings[name]:
                names.append(name)
    return list(dict.fromkeys(names))


def read_record(out: Path) -> dict:
    """Return what is known of the sweeps in `out`: the script, the tune seeds, and the flags of each run by the name of
    its folder. Raises InputError for a damaged file."""
    path = out / "sweep.json"
    record = {"script": None, "tune_seeds": [], "runs": {}} | (read_json_object(path) if path.exists() else {})
    runs, seeds = record["runs"], record["tune_seeds"]
    if not isinstance(runs, dict) or not all(isinstance(given, dict) for given in runs.values()):
        raise InputError(f"{path}: its runs are not objects by the names of folders: mend it, or give another --out")
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise InputError(f"{path}: its tune_seeds are not a list of numbers: mend it, or give another --out")
    return record


def split_alternatives(action: argparse.Action, lists: list[list[str]]) -> list[list[str]]:
    """Return a flag's alternatives. lists: the values of each occurrence of the flag."""
    name = action.option_strings[0]
    if action.nargs == "+":
        return [[name, *values] for values in lists]
    if action.nargs == 0:
        return [[name] if value == "on" else [] for values in lists for value in values or ["on"]]
    return [[name, value] for values in lists for value in values]


def planned(parse: Callable[[list[str]], Settings], choice: dict[str, list[str]], varied: list[str]) -> PlannedRun:
    """Return the run of one alternative of each flag, named after its method and the flags that vary.

    parse: reads the script's flags. Raises InputError if the script refuses them together.
    """
    argv = [word for words in choice.values() for word in words]
    try:
        recorded = json.loads(json.dumps(parse(argv).recorded))  # tuples become lists, as in run.json
    except InputError as error:
        differing = " ".join(word for name in varied for word in choice[name])
        alone = f"{differing}: {error}; or sweep what it goes with on its own, into the same --out"
        raise InputError(alone if differing else str(error)) from None
    parts = [f"{name}={in_name(recorded[name])}" for name in recorded if name == "method" or name in varied]
    # Without --template, the script chooses one and records that.
    settings = {
        name: value
        for name, value in recorded.items()
        if name not in CHANGE_NO_RESULT and not (name == "template" and value is None)
    }
    return PlannedRun(",".join(parts), argv, {name: recorded[name] for name in choice}, settings)


def in_name(value: object) -> str:
    """Return a setting's value as part of a folder's name."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = "+".join(value) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def fingerprint(settings: dict, names: dict) -> str:
    """Return a text that is the same for two runs if they have the same settings of these names."""
    return json.dumps([settings.get(name) for name in names])
