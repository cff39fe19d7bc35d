"""Run a training script for every combination of its flags' values, and compare the results; see `--help`."""

import argparse
import sys
import time
from pathlib import Path

from minibalora.base import cli, distributed
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable
from minibalora.base.progress import in_words
from minibalora.sweep import report
from minibalora.sweep.comparison import choose_measurements, rows_of
from minibalora.sweep.grid import PlannedRun, plan_runs, read_record
from minibalora.sweep.pictures import save_pictures
from minibalora.sweep.processes import is_finished, last_error, only_sweep, run_all
from minibalora.sweep.results import read_results, record_runs, recorded_runs, varied_flags
from minibalora.sweep.tuning import at_chosen_rates, check_seeds, given_of, split_runs


def main(argv: list[str] | None = None) -> int:
    args, training = parse_flags(argv)
    out, failed = args.out[0], {}
    if args.script is None:
        given = recorded_runs(out)
    else:
        runs = plan_runs(args.script, training, out, args.tune_seeds)
        check_comparison(args, runs)
        check_seeds(runs, args.tune_seeds, out)
        check_writable(out / max((run.name for run in runs), key=len), "--out")
        if not args.report:
            with only_sweep(out) as lock:
                failed = tune_and_train(args, runs, lock)
        chosen, left_out = at_chosen_rates(runs, args.tune_seeds, out, (args.score, args.tune, args.forgotten))
        for label in left_out:
            print(f"left out: {label}: none of the runs that choose its learning rate is finished", file=sys.stderr)
        given = given_of(split_runs(runs, args.tune_seeds)[0] + chosen)
    print_report(out, given, args)
    return 1 if failed else 0


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the sweep's own flags, and the words for the script."""
    parser = cli.OneLineParser(
        prog="python -m minibalora sweep",
        description="Run train_nlg.py or train_nlu.py for every combination of its flags' values, each run in a folder "
        "named after what differs, and compare the methods: the best learning rate of each, its mean over seeds, and "
        "pictures. Every flag of the script may have several values: --method lora pissa --lr 1e-3 2e-3 --seed 1 2 3. "
        "A flag that takes several values in one run, such as --targets, is repeated instead; a switch, such as "
        "--plain, takes off and on. The same command continues a stopped sweep, and finished runs are not repeated. "
        "What can't be combined goes into another sweep with the same --out, which is reported together.",
    )
    add = parser.add_argument
    add("script", nargs="?", type=cli.path, metavar="SCRIPT", help="path of train_nlg.py or train_nlu.py; its flags "
        "follow (see its --help)")  # fmt: skip
    add(
        "--out", nargs="+", type=cli.path, required=True, metavar="DIR", help="folder for the runs, tables and pictures"
    )
    add("--jobs", type=cli.positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--tune-seeds", nargs="+", type=cli.natural, default=[], metavar="SEED", help="choose each learning rate by "
        "runs with these seeds, which do not count; then run only this rate with the seeds of --seed")  # fmt: skip
    add("--report", action="store_true", help="train nothing, report what is finished; without SCRIPT, of all sweeps "
        "in --out")  # fmt: skip
    add("--baseline", metavar="METHOD", help="method, or a row of the table, from which to give every method's "
        "difference, paired by seed (default: none)")  # fmt: skip
    add("--score", metavar="NAME", help="what to compare, by its name in report.json (default: the first metric of the "
        "last evaluation set, the exact match, or the loss on held-out responses)")  # fmt: skip
    add("--tune", metavar="NAME", help="what chooses the learning rate (default: dev, a classifier's score on the dev "
        "set, or else --score)")  # fmt: skip
    add("--forgotten", metavar="NAME", help="what measures forgetting by its rise (default: the first KL or loss on "
        "other text in report.json)")  # fmt: skip
    args, training = parser.parse_known_args(argv)
    if len(args.out) > 1:
        raise InputError(f"--out {' '.join(map(str, args.out))}: a sweep has one folder: give one")
    if args.script is None and (training or not args.report):
        raise InputError("the script is missing: give the path of train_nlg.py or train_nlu.py as the first word")
    if distributed.is_torchrun():
        raise InputError("sweep starts processes of its own: start it with python, not torchrun")
    return args, training


def check_comparison(args: argparse.Namespace, runs: list[PlannedRun]) -> None:
    """Raise InputError if the runs will have nothing to compare, or no baseline."""
    methods = {run.settings["method"] for run in runs}
    if args.baseline is not None and args.baseline.partition(", ")[0] not in methods:
        mend = f"give one of {', '.join(sorted(methods))}, or --report without the script for all sweeps of the folder"
        raise InputError(f"--baseline {args.baseline}: not a method of this sweep: {mend}")
    if args.script.name == "train_nlg.py" and args.score is None:
        if any(run.settings["eval"] is None and not run.settings["is_toy"] for run in runs):
            raise InputError("the runs have no score without --eval: give it, or --retain and --score")


def tune_and_train(args: argparse.Namespace, runs: list[PlannedRun], lock: int) -> dict[Path, str]:
    """Do the unfinished runs; with --tune-seeds, first those that choose rates. Returns why runs failed, by folder."""
    out, failed = args.out[0], {}
    tuning, counted = split_runs(runs, args.tune_seeds)
    if tuning:
        record_runs(out, args.script.name, tuning, args.tune_seeds)
        print("first the runs that choose the learning rates", flush=True)
        failed = train(args.script, tuning, out, args.jobs, lock)
        counted, _ = at_chosen_rates(runs, args.tune_seeds, out, (args.score, args.tune, args.forgotten))
        print("then the runs that count, at the chosen rates", flush=True)
    record_runs(out, args.script.name, counted)
    return failed | train(args.script, counted, out, args.jobs, lock)


def train(script: Path, runs: list[PlannedRun], out: Path, jobs: int, lock: int) -> dict[Path, str]:
    """Do the unfinished runs, with a line for each. Returns why runs failed, by folder."""
    missing = [run for run in runs if not is_finished(out / run.name)]
    print(f"{len(runs)} runs in {out}: {len(runs) - len(missing)} are finished, {len(missing)} to do", flush=True)
    failed, started, ended = {}, time.monotonic(), 0

    def report_end(folder: Path, reason: str | None) -> None:
        nonlocal ended
        ended += 1
        if reason is not None:
            failed[folder] = reason
        left = (time.monotonic() - started) / ended * (len(missing) - ended)
        state = "finished" if reason is None else f"failed: {reason}"
        rest = f"; about {in_words(left)} left" if left > 0 else ""
        print(f"{ended} of {len(missing)}: {folder.name}: {state}{rest}", flush=True)

    run_all({out / run.name: command_of(script, run, out) for run in missing}, jobs, lock, report_end)
    return failed


def command_of(script: Path, run: PlannedRun, out: Path) -> list[str]:
    """Return the words after `python`. A run that was started before is resumed."""
    resume = ["--resume"] if (out / run.name / "run.json").exists() else []
    return [str(script), *run.argv, "--out", str(out / run.name), *resume]


def print_report(out: Path, given: dict[str, dict], args: argparse.Namespace) -> None:
    """Print the table, and write table.csv, runs.csv and the pictures into `out`.

    given: the flags of the runs to compare, by the names of their folders.
    """
    results, tune_seeds = read_results(out, given), {*args.tune_seeds, *read_record(out)["tune_seeds"]}
    print(f"\n{len(results)} of {len(given)} runs are finished")
    for name in given:
        if not is_finished(out / name) and (error := last_error(out / name)):
            print(f"not finished: {name}: {error}", file=sys.stderr)
    if not results:
        return
    varied, measurements = varied_flags(given), choose_measurements(results, args.score, args.tune, args.forgotten)
    rows = rows_of(results, varied, measurements, tune_seeds)
    table = report.table_of(rows, args.baseline)
    print(f"{report.in_words(table, rows, args.baseline, measurements)}\n")
    report.write_csv(out / "table.csv", report.COLUMNS, table)
    report.write_runs(out / "runs.csv", results, varied, tune_seeds)
    print(f"saved to {out / 'table.csv'} and {out / 'runs.csv'}")
    for line in save_pictures(out, rows, varied, measurements):
        print(line)
