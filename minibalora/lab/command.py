"""Run the laboratory: pre-train the models, fine-tune them by several methods, and write the tables; see `--help`."""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable, read_json_object, write_json
from minibalora.base.progress import Progress, in_words
from minibalora.lab import grid, minilm
from minibalora.lab.data import write_data, write_rows
from minibalora.lab.glue_data import write_glue_data
from minibalora.lab.grid import FULL, QUICK, Sweep, Task, models_of, pretraining_of, sweeps_of, words_of
from minibalora.lab.inherited import measure_bert, measure_llama
from minibalora.lab.pictures import save_pictures
from minibalora.lab.report import write_tables
from minibalora.lab.results import is_complete, read_runs


def main() -> int:
    args = parse_flags()
    out, failed = args.out, []
    if args.minilm and args.quick:
        raise InputError("--minilm is an experiment of its own: leave out --quick")
    tasks = check_tasks(args.task, minilm.CELLS if args.minilm else grid.TASKS, args.minilm is not None)
    sweeps = minilm.sweeps_with(args.minilm[0]) if args.minilm else sweeps_of(QUICK if args.quick else FULL)
    sweeps = [sweep for sweep in sweeps if sweep.task.name in tasks]
    if not args.report:
        check_writable(out / "runs", "--out")
        if args.minilm:
            write_glue_data(*args.minilm, tasks, out / "data")
        else:
            write_data(out / "data")
        failed = experiment(sweeps, out, args.jobs)
    runs = read_runs(sweeps, out)
    if args.report and not runs:
        raise InputError(f"--out {out}: holds no finished runs of these models: run the same command without --report")
    write_json(out / "results.json", runs)
    count = sum(run["counts"] for run in runs)
    print(f"{count:,} runs count; failed: {', '.join(failed) or 'none'}\n\n{write_tables(out, runs)}")
    for line in save_pictures(out, runs):
        print(line)
    return 1 if failed else 0


def parse_flags() -> argparse.Namespace:
    parser = cli.OneLineParser(
        "python -m minibalora lab",
        "Test what the method does: pre-train the tiny models on text with and without defects, fine-tune each by "
        "several methods with their learning rates tuned, and compare. The same command continues what was stopped.",
    )
    add = parser.add_argument
    add("--out", type=cli.path, required=True, metavar="DIR", help="folder for models, runs, tables and pictures")
    add("--quick", action="store_true", help="only the built-in models and three methods; replaces the tables in --out")
    add("--task", nargs="+", choices=(*grid.TASKS, *minilm.CELLS), help="only these; bert and llama are the tiny "
        "models, the others MiniLM's tasks; replaces the tables in --out (default: all)")  # fmt: skip
    add("--minilm", nargs=2, type=cli.path, metavar=("MODEL", "GLUE"), help="instead of the tiny models: "
        "all-MiniLM-L6-v2, in the folder MODEL, on GLUE's CoLA, MRPC, RTE and STS-B, folders in GLUE; replaces the "
        "tables in --out")  # fmt: skip
    add("--jobs", type=cli.positive_int, default=os.cpu_count(), metavar="N", help="runs at a time (default: one a "
        "core)")  # fmt: skip
    add("--report", action="store_true", help="train nothing, report what is finished; reads no file of GLUE")
    return parser.parse_args()


def check_tasks(chosen: list[str] | None, known: Iterable[str], is_minilm: bool) -> list[str]:
    """Return the chosen tasks, or all that are known if none is. Raises InputError for one of the other experiment."""
    if unknown := [task for task in chosen or () if task not in known]:
        remedy = "leave out --minilm" if is_minilm else "add --minilm MODEL GLUE"
        raise InputError(f"--task {unknown[0]}: this experiment has {', '.join(known)}: give one of these, or {remedy}")
    return list(chosen or known)


def experiment(sweeps: list[Sweep], out: Path, jobs: int) -> list[str]:
    """Do what is not done yet: models, what they inherited, and sweeps. Returns the names of what has failed."""
    models = models_of(sweeps, out)
    record_commands(sweeps, models, out)
    missing = {folder: (task, name) for folder, (task, name) in models.items()
               if name != task.model_name and not (folder / "model.safetensors").exists()}  # fmt: skip
    waiting = [sweep for sweep in sweeps if not is_complete(sweep, out)]
    seconds = sum(task.seconds_of_pretraining for task, _ in missing.values())
    seconds += sum(sweep.run_count * sweep.task.seconds for sweep in waiting)
    runs, time = sum(sweep.run_count for sweep in waiting), in_words(seconds / jobs)
    print(f"{len(missing)} models to pre-train, {len(waiting)} of {len(sweeps)} sweeps with up to {runs:,} runs: about "
          f"{time} with {jobs} at a time on as many cores of an AMD EPYC", flush=True)  # fmt: skip
    commands = {folder: pretraining_of(*pair, folder) for folder, pair in missing.items()}
    failed = run_each(commands, jobs, "pre-training", "model")
    if failed:
        return failed
    record_inherited(models, out / "inherited.json")
    commands = {sweep.folder(out): ["minibalora", *words_of(sweep, out)] for sweep in waiting}
    return run_each(commands, jobs, "sweeps", "sweep")


def record_commands(sweeps: list[Sweep], models: dict[Path, tuple[Task, str]], out: Path) -> None:
    """Write the command of each sweep and pre-training into a file beside its folder. Raises InputError if another one
    is there: what is finished would count although other flags made it."""
    commands = {folder: pretraining_of(task, name, Path()) for folder, (task, name) in models.items()
                if name != task.model_name}  # fmt: skip
    for sweep in sweeps:
        words = words_of(sweep, Path())
        words[words.index("--model") + 1] = sweep.pretraining  # its folder may have moved
        commands[sweep.folder(out)] = words
    for folder, words in commands.items():
        write_rows(folder.with_name(f"{folder.name}.jsonl"), [words])


def record_inherited(models: dict[Path, tuple[Task, str]], path: Path) -> None:
    """Add to a JSON file what each model can do before it is fine-tuned, where it is not there yet."""
    measure = {"bert": measure_bert, "llama": measure_llama}
    inherited = read_json_object(path) if path.exists() else {}
    for folder, (task, name) in models.items():
        key = f"{task.name}-{name}"
        if key not in inherited and task.name in measure:
            inherited[key] = measure[task.name](folder)
            write_json(path, inherited)
    if inherited:
        print(json.dumps(inherited, indent=2), flush=True)


def run_each(commands: dict[Path, list[str]], jobs: int, name: str, unit: str) -> list[str]:
    """Run `python -m` commands, `jobs` at a time, each with its share of the cores. What a command prints goes into
    FOLDER.txt. Returns a line for each command that failed. Ctrl-C ends the running ones; run again, they continue.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} | os.environ
    stopped, failed, working = threading.Event(), [], set()

    def run(folder: Path) -> None:
        if stopped.is_set():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.txt"), "w") as file:
            process = subprocess.Popen([sys.executable, "-m", *commands[folder]], stdout=file, stderr=file,
                                       stdin=subprocess.DEVNULL, env=environment, start_new_session=True)  # fmt: skip
            working.add(process)
            if stopped.is_set():  # since the look above
                process.terminate()
            if process.wait() != 0 and not stopped.is_set():
                failed.append(f"{folder} (see {folder.name}.txt beside it)")
            working.remove(process)
        progress.update()

    with Progress(name, len(commands), unit, is_shown=len(commands) > 0) as progress, ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(run, folder) for folder in commands]:
                future.result()
        except BaseException:
            stopped.set()
            for process in list(working):
                process.terminate()
            raise
    return failed
