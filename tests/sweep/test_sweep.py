"""The sweep: its runs, their processes, and the comparison of what they reached."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibalora.base.files import write_json
from minibalora.sweep.command import main
from minibalora.sweep.comparison import baseline_of, choose_measurements, rows_of
from minibalora.sweep.grid import plan_runs
from minibalora.sweep.intervals import mean_interval, t_quantile, t_within
from minibalora.sweep.pictures import frontier_points, lines_over
from minibalora.sweep.processes import only_sweep, run_all
from minibalora.sweep.results import read_results, record_runs, recorded_runs, varied_flags

ROOT = Path(__file__).parents[2]
NLG, NLU = ROOT / "train_nlg.py", ROOT / "train_nlu.py"


def names_of(script: Path, words: str, out: Path = Path("absent")) -> list[str]:
    return [run.name for run in plan_runs(script, words.split(), out)]


# The runs


def test_each_combination_is_a_run_named_after_what_differs():
    words = "--method lora pissa --lr 5e-4 0.001 --seed 1 --epochs 2"
    assert names_of(NLU, words) == [f"method={m},lr={lr}" for m in ("lora", "pissa") for lr in ("0.0005", "0.001")]
    (run,) = plan_runs(NLU, ["--epochs", "2"], Path("absent"))
    assert run.name == "method=ba-lora" and run.argv == ["--epochs", "2"] and run.given == {"epochs": 2}


def test_flags_with_several_values_are_repeated_and_switches_are_on_or_off():
    runs = plan_runs(NLG, "--targets q_proj v_proj --targets o_proj --plain off on --tf32".split(), Path("absent"))
    assert [run.name for run in runs] == [
        f"method=ba-lora,targets={targets},plain={plain}"
        for targets in ("q_proj+v_proj", "o_proj")
        for plain in ("off", "on")
    ]
    assert runs[1].argv == "--targets q_proj v_proj --plain --tf32".split()
    assert runs[2].argv == "--targets o_proj --tf32".split()


def test_values_may_be_repeated_flags_too():
    assert names_of(NLU, "--lr 1e-3 --lr 2e-3") == names_of(NLU, "--lr 1e-3 2e-3")


def test_a_path_becomes_one_part_of_a_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
    words = f"--model {tmp_path}/models/a {tmp_path}/models/b --data x.tsv --task sst2"
    names = names_of(NLU, words)
    assert len(set(names)) == 2 and not any("/" in name for name in names)


def finish(out: Path, script: Path, words: str, after=None, report: dict | None = None) -> None:
    """Write the files of a sweep's finished runs. after: from a run's settings to its measurements."""
    runs = plan_runs(script, words.split(), out)
    out.mkdir(exist_ok=True)
    record_runs(out, script.name, runs)
    for run in runs:
        finish_run(out / run.name, run.settings, after, report)


def finish_run(folder: Path, settings: dict, after=None, report: dict | None = None) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", {"settings": settings | {"template": "alpaca", "data_digest": "0"}})
    content = report or {"before": {"exact match, all (9)": 0.0}, "after": {"exact match, all (9)": 50.0}}
    if after is not None:
        content = content | {"after": after(settings)}
    write_json(folder / "report.json", content)


def test_a_run_that_is_there_keeps_its_folder_though_more_differs_now(tmp_path):
    finish(tmp_path, NLG, "--method lora --seed 1 2")
    assert names_of(NLG, "--method lora pissa --rank 16 --seed 1 2 3", tmp_path) == [
        *(f"method=lora,seed={seed}" for seed in (1, 2, 3)), *(f"method=pissa,seed={seed}" for seed in (1, 2, 3)),
    ]  # fmt: skip
    names = names_of(NLG, "--method lora --rank 8 16 --seed 1", tmp_path)  # 16 is the built-in model's rank
    assert names == ["method=lora,rank=8", "method=lora,seed=1"]


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--resume", ["--resume", "leave it out"]),
        ("--features f.safetensors", ["--features", "same file"]),
        ("--lr", ["--lr", "at least one"]),
        ("--lr fast", ["--lr", "fast"]),
        ("--speed 1 2", ["unrecognized", "--speed"]),
        ("--lr 1e-3 0.001", ["2 runs would get the folder", "lr=0.001"]),
        ("--save-every 1 2 --seed 3 3", ["2 runs would get the folder"]),
        ("--method lora ba-lora --lambda1 0 1", ["--method lora --lambda1 0:", "on its own"]),
        ("--plain maybe", ["--plain", "maybe"]),
        ("--method lora full --rank 8", ["--method full: --rank"]),
        ("--method lora --baseline pissa", ["--baseline pissa", "lora"]),
        ("--tune-seeds 1 --lr 1e-3 2e-3", ["--tune-seeds", "--seed is missing"]),
        ("--tune-seeds 1 2 --seed 3 2", ["--seed 2", "one of --tune-seeds"]),
        ("--tune-seeds 1 1 --seed 2", ["2 runs would get the folder"]),
        ("--tune-seeds -1 --seed 2", ["--tune-seeds", "-1"]),
    ],
)
def test_runs_that_cannot_be_are_refused_before_any_starts(words, parts, refuses, tmp_path):
    refuses(lambda: main([str(NLU), "--out", str(tmp_path / "sweep"), *words.split()]), *parts)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "--out"),
        (["--out", "new"], "the script is missing"),
        (["--out", "new", "--report"], "holds no sweep"),
        (["--out", "new", "--report", "--lr", "1"], "1: no such script"),
        ([str(NLU), "--out", "new", "other"], "one folder"),
        (["train.py", "--out", "new"], "train.py: no such script"),
        ([str(NLU), "--out", "new", "--jobs", "0"], "--jobs"),
        ([str(NLU), "--out", "file/new"], "can't write there"),
    ],
)
def test_a_wrong_command_is_refused(words, part, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    refuses(lambda: main(words), part)
    assert os.listdir(tmp_path) == ["file"]


def test_runs_without_a_score_are_refused(tiny, tmp_path, refuses):
    data = tmp_path / "rows.jsonl"
    words = [str(NLG), "--out", str(tmp_path / "new"), "--model", str(tiny), "--data", str(data), "--seed", "1", "2"]
    refuses(lambda: main(words), "no score without --eval")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_runs_is_refused(tmp_path, refuses):
    finish(tmp_path, NLG, "--seed 1 2 --epochs 1")
    refuses(lambda: main([str(NLU), "--out", str(tmp_path)]), "a sweep of train_nlg.py")
    path = tmp_path / "method=ba-lora,seed=1" / "run.json"  # as of a version whose default was another
    write_json(path, {"settings": json.loads(path.read_text())["settings"] | {"warmup_ratio": 0.5}})
    refuses(lambda: plan_runs(NLG, "--seed 1 2 --epochs 1".split(), tmp_path), "--warmup-ratio is", "another --out")


def test_sweeps_of_other_flags_in_one_folder_get_folders_named_after_these(tmp_path):
    words = ["lora pissa", "ba-lora --recipe 2024", "ba-lora --lambda2 0 --lambda3 0", "ba-lora --recipe iclr2026"]
    for part in [*words, *words]:
        finish(tmp_path, NLU, f"--method {part} --seed 1 2")
    names = {path.parent.name for path in tmp_path.glob("*/run.json")}
    ba_lora = ["ba-lora", "ba-lora,recipe=iclr2026", "ba-lora,recipe=iclr2026,lambda2=0,lambda3=0"]
    assert names == {f"method={name},seed={seed}" for name in ["lora", "pissa", *ba_lora] for seed in (1, 2)}
    assert names == recorded_runs(tmp_path).keys()


# The processes


@pytest.fixture
def run_codes(tmp_path):
    """run_codes(codes, jobs, report): a sweep whose runs do a line of Python each, by the names of their folders."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nif __name__ == '__main__':\n    exec(sys.argv[1])\n")

    def run(codes: dict[str, str], jobs: int, report) -> None:
        with only_sweep(tmp_path) as lock:
            commands = {tmp_path / name: [str(script), code] for name, code in codes.items()}
            run_all(commands, jobs, lock, lambda folder, reason: report(folder.name, reason))

    return run


REPORT = "open(__import__('pathlib').Path({!r}) / 'report.json', 'w').close()"


def test_runs_go_several_at_a_time_and_a_failed_one_stops_no_other(run_codes, tmp_path):
    """The first two wait for each other."""
    meet = "import os, time; open('{0}/{1}', 'w').close()\nwhile not os.path.exists('{0}/{2}'): time.sleep(0.01)\n"
    codes = {name: meet.format(tmp_path, name + "-here", other + "-here") + REPORT.format(str(tmp_path / name))
             for name, other in ("ab", "ba")}  # fmt: skip
    codes |= {"c": "print('progress', file=sys.stderr); sys.exit('error: too large\\n')"}
    codes |= {"d": "import os; os.kill(os.getpid(), 9)", "e": "1 / 0", "f": REPORT.format(str(tmp_path / "f"))}
    ended = {}
    run_codes(codes, 2, ended.__setitem__)
    assert "SIGKILL" in ended.pop("d")
    assert ended == dict.fromkeys("abf") | {"c": "error: too large", "e": "ZeroDivisionError: division by zero"}
    assert (tmp_path / "c" / "errors.txt").read_text().startswith("progress\n")


def test_a_run_that_leaves_no_report_has_failed(run_codes, tmp_path):
    ended = {}
    run_codes({"a": "print('more', sys.stdin.read(), sys.argv[2:])"}, 1, ended.__setitem__)
    run_codes({"a": "print('text')"}, 1, ended.__setitem__)
    assert ended == {"a": "ended with status 0 and without a message"}
    assert (tmp_path / "a" / "output.txt").read_text() == "more  []\ntext\n"


def test_a_run_whose_worker_dies_has_failed_and_the_next_gets_another(run_codes):
    ended = {}
    codes = {"a": "import os, time; os.kill(os.getppid(), 9); time.sleep(0.3)", "b": "sys.exit('error: b')"}
    run_codes(codes, 1, ended.__setitem__)
    assert "SIGKILL" in ended["a"] and ended["b"] == "error: b"


def test_runs_share_the_imports_of_their_worker_but_nothing_else(run_codes, tmp_path):
    code = "import os; print(os.getppid(), os.environ['OMP_NUM_THREADS'], hasattr(sys, 'mark')); sys.mark = 1"
    run_codes({"a": code, "b": code}, 1, lambda *_: None)
    a, b = [(tmp_path / name / "output.txt").read_text().split() for name in "ab"]
    assert a == b and a[1:] == [os.environ["OMP_NUM_THREADS"], "False"]


def test_an_interrupted_sweep_ends_its_processes(run_codes, tmp_path):
    """When the third run ends, the others wait for a signal, and the sweep is interrupted; then no process is left."""
    wait = (
        "import signal, time; signal.signal(15, lambda *_: sys.exit('saved')); open('{}', 'w').close(); time.sleep(60)"
    )
    files = {name: tmp_path / f"{name}-waits" for name in "ab"}
    watch = f"import os, time\nwhile not all(map(os.path.exists, {list(map(str, files.values()))})): time.sleep(0.01)"

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_codes({name: wait.format(path) for name, path in files.items()} | {"c": watch}, 3, interrupt)
    assert [(tmp_path / name / "errors.txt").read_text() for name in "ab"] == ["saved\n"] * 2
    with only_sweep(tmp_path):
        pass


def test_two_sweeps_do_not_work_in_one_folder(tmp_path, refuses):
    def again():
        with only_sweep(tmp_path):
            pass

    with only_sweep(tmp_path):
        refuses(again, "another sweep", tmp_path)
    again()


WAITING = """
import runpy, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from minibalora.run.loop import Run

def wait(run):
    while Path({flag!r}).exists() and not run._received:
        time.sleep(0.01)

Run._show = wait
runpy.run_path({script!r}, run_name=__name__)
"""


def test_a_stopped_sweep_continues_and_a_failed_run_is_reported(tmp_path, in_command):
    """While the flag exists, a run waits for a signal after its first step. Ctrl-C reaches the whole process group."""
    script, flag = tmp_path / "train_nlu.py", tmp_path / "flag"
    script.write_text(WAITING.format(root=str(ROOT), flag=str(flag), script=str(NLU)))
    flag.touch()
    words = [str(script), "--out", str(tmp_path), "--lr", "1e-3", "1e30", "--max-steps", "4", "--max-rows", "96"]
    words += ["--method", "lora", "--batch-size", "8", "--device", "cpu"]
    command = [sys.executable, "-m", "minibalora", "sweep", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
    sweep = subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=heed, **pipes)
    good, bad = tmp_path / "method=lora,lr=0.001", tmp_path / "method=lora,lr=1e+30"
    while not (good / "log.jsonl").exists() or not (good / "log.jsonl").read_text():
        assert sweep.poll() is None, sweep.stderr.read()
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGINT)
    printed, error = sweep.communicate()
    assert sweep.returncode == 130 and error == "error: interrupted; give the same command to continue\n", error
    assert "stopped after step 1 of 4" in (good / "output.txt").read_text() and not (good / "report.json").exists()

    flag.unlink()
    status, printed, error = in_command(main, *words, "--baseline", "lora")
    assert status == 1 and "2 runs in" in printed and "0 are finished" in printed
    assert (
        f"{bad.name}: failed: error: step" in printed
        and "not finite" in printed
        and "1 of 2 runs are finished" in printed
    )
    assert "resumed at step 1" in (good / "output.txt").read_text()
    assert f"not finished: {bad.name}: error: step" in error
    (row,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    report = json.loads((good / "report.json").read_text())
    assert float(row["mean"]) == report["after"]["clean reviews"]["accuracy"]


# Rates chosen with seeds of their own


def write_runs_of(tmp_path, monkeypatch, after, fails=lambda name: False) -> list[str]:
    """Let the sweep's runs write their files at once, or fail. Returns the list to which started runs are added."""
    started = []

    def run_all(commands, jobs, lock, report):
        for folder, (_, *words) in commands.items():
            started.append(folder.name)
            if not fails(folder.name):
                (run,) = plan_runs(NLG, words[: words.index("--out")], folder)
                finish_run(folder, run.settings, after)
            report(folder, "error: step 3 is not finite" if fails(folder.name) else None)

    monkeypatch.setattr("minibalora.sweep.command.run_all", run_all)
    return started


def rises_with_rate(settings: dict) -> dict:
    """lora is best at 2e-3 with the seeds 101 and 102, and at 1e-3 with all others."""
    best = 2e-3 if settings["seed"] > 100 else 1e-3
    return {"exact match, all (9)": 50 + settings["seed"] % 100 - 1e6 * (settings["lr"] - best) ** 2}


TUNED = [str(NLG), *"--method lora pissa --lr 1e-3 2e-3 --tune-seeds 101 102 --seed 1 2 3 --jobs 2".split()]


def test_tune_seeds_choose_the_rate_and_do_not_count(tmp_path, monkeypatch, in_command):
    started = write_runs_of(tmp_path, monkeypatch, rises_with_rate)
    words = [*TUNED, "--out", str(tmp_path), "--baseline", "pissa"]
    status, printed, error = in_command(main, *words)
    assert (status, error) == (0, "")
    assert started == [f"method={m},lr={lr},seed={seed}" for m in ("lora", "pissa") for lr in ("0.001", "0.002")
                       for seed in (101, 102)] + [f"method={m},lr=0.002,seed={seed}" for m in ("lora", "pissa")
                                                  for seed in (1, 2, 3)]  # fmt: skip
    assert "rates chosen with seeds 101, 102, which do not count\n" in printed
    assert "lora   0.002, highest     3  51.00  48.52 to 53.48          -        +0.00" in printed
    table = (tmp_path / "table.csv").read_text()
    runs = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [row["seed"] for row in runs if row["tuning"] == "True"] == ["101", "102"] * 4 and len(runs) == 14

    for again in (words, [*words, "--report"], ["--out", str(tmp_path), "--report", "--baseline", "pissa"]):
        status, printed, error = in_command(main, *again)
        assert (status, error, len(started)) == (0, "", 14) and "14 of 14 runs are finished" in printed
        assert (tmp_path / "table.csv").read_text() == table


def test_a_report_between_tuning_and_the_runs_that_count(tmp_path, monkeypatch, in_command):
    def stop(folder):
        if ",seed=2" in folder:
            raise KeyboardInterrupt
        return False

    write_runs_of(tmp_path, monkeypatch, rises_with_rate, stop)
    words = [*TUNED, "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(words)
    status, printed, error = in_command(main, *words, "--report")
    assert status == 0 and "9 of 14 runs are finished" in printed
    assert "\nlora   0.002, highest     1  50.00" in printed and "\npissa  0.002, highest     0      -" in printed
    write_runs_of(tmp_path, monkeypatch, rises_with_rate)
    assert in_command(main, *words)[0] == 0
    assert len(list(tmp_path.glob("*/report.json"))) == 14


def test_a_row_whose_tuning_runs_failed_is_left_out_and_others_go_on(tmp_path, monkeypatch, in_command):
    started = write_runs_of(
        tmp_path, monkeypatch, rises_with_rate, lambda name: "pissa" in name or "lr=0.002,seed=102" in name
    )
    status, printed, error = in_command(main, *TUNED, "--out", str(tmp_path))
    assert status == 1 and "left out: pissa: none of the runs that choose its learning rate is finished\n" in error
    assert started[8:] == [f"method=lora,lr=0.001,seed={seed}" for seed in (1, 2, 3)]  # 0.002 has fewer runs
    assert "\nlora  0.001, lowest     3" in printed and "\npissa" not in printed
    status, printed, error = in_command(main, *TUNED, "--out", str(tmp_path / "new"), "--report")
    assert status == 0 and error.count("left out: ") == 2 and "0 of 8 runs" in printed


def test_sweeps_with_other_tune_seeds_share_a_folder(tmp_path, monkeypatch, in_command, refuses):
    write_runs_of(tmp_path, monkeypatch, rises_with_rate)
    words = [str(NLG), "--out", str(tmp_path), "--lr", "1e-3", "2e-3"]
    main([*words, *"--method lora pissa --tune-seeds 101 --seed 1 2".split()])
    main([*words, *"--method ba-lora --lambda1 0 --tune-seeds 102 --seed 1 2".split()])
    in_command(main, *words, *"--method ba-lora --lambda2 0 --seed 1 2".split())
    status, printed, _ = in_command(main, "--out", str(tmp_path), "--report", "--baseline", "pissa")
    assert "rates chosen with seeds 101, 102, which do not count, except for ba-lora, lambda2 0: with" in printed
    assert [line.split("  ")[0] for line in printed.split("\n\n")[-2].splitlines()[1:]] == [
        "lora", "pissa", "ba-lora, lambda1 0", "ba-lora, lambda2 0"
    ]  # fmt: skip
    refuses(lambda: main([*words, "--seed", "101", "102"]), "--seed 101", "--tune-seeds of a sweep in", tmp_path)


# The comparison


@pytest.mark.parametrize(
    "freedom, t",
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_are_the_published_ones(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-5)


@given(t=st.floats(0, 30), freedom=st.integers(1, 200))
def test_the_distribution_is_the_integral_of_its_density(t, freedom):
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    n = 2000  # intervals of Simpson's rule
    values = [constant * (1 + (t * i / n) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(n + 1)]
    integral = t / n / 3 * (values[0] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]) + values[-1])
    assert t_within(t, freedom) == pytest.approx(2 * integral, abs=1e-7)


def test_the_interval_of_a_mean():
    assert mean_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 3.1824 * 1.2909944 / 2), rel=1e-4)
    mean, half = mean_interval([7.0])
    assert mean == 7 and math.isnan(half)


@pytest.fixture
def compared(tmp_path):
    """compared(words, after, *more) -> rows, measurements: of a sweep whose runs measured after(settings)."""

    def compare(words: list[str], after, script=NLG, **names):
        for part in words:
            finish(tmp_path, script, part, after)
        runs = recorded_runs(tmp_path)
        results = read_results(tmp_path, runs)
        measurements = choose_measurements(results, *map(names.get, ("score", "tune", "forgotten")))
        return rows_of(results, varied_flags(runs), measurements), measurements

    return compare


def exact_match(settings: dict) -> dict:
    score = {"lora": 60.0, "pissa": 70.0, "ba-lora": 75.0}[settings["method"]] + settings["seed"]
    return {"exact match, all (9)": score - 1e6 * (settings["lr"] - 1e-3) ** 2, "loss on held-out responses": 1 / score}


def test_each_method_gets_its_best_rate_then_mean_and_paired_difference(compared, tmp_path, capsys):
    rows, measurements = compared(["--method lora pissa --lr 5e-4 1e-3 2e-3 --seed 1 2 3"], exact_match)
    assert [(row.label, row.lr, row.scores) for row in rows] == [
        ("lora", 1e-3, {1: 61, 2: 62, 3: 63}), ("pissa", 1e-3, {1: 71, 2: 72, 3: 73})
    ]  # fmt: skip
    assert main(["--out", str(tmp_path), "--report", "--baseline", "pissa"]) == 0
    printed = capsys.readouterr().out
    assert "lora   0.001     3  62.00  59.52 to 64.48          -       -10.00  -10.00 to -10.00      3\n" in printed
    table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["difference"] for row in table] == ["-10.0", ""] and {row["rates"] for row in table} == {"3"}
    runs = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert len(runs) == 18 and runs[0]["after: loss on held-out responses"] and runs[0]["lr"] == "0.0005"


def test_a_report_on_a_script_covers_the_runs_of_that_command(compared, tmp_path, in_command):
    compared(["--method lora pissa --seed 1 2"], exact_match)
    words = [str(NLG), "--out", str(tmp_path), *"--method lora --seed 1 2 3 --report".split()]
    status, printed, _ = in_command(main, *words)
    assert status == 0 and "2 of 3 runs are finished" in printed and "\nlora" in printed and "\npissa" not in printed
    status, printed, _ = in_command(main, *words[:2], str(tmp_path / "new"), "--report")
    assert status == 0 and "0 of 1 runs are finished" in printed and not (tmp_path / "new").exists()


def test_a_lower_loss_is_better(compared):
    rows, measurements = compared(
        ["--method lora --lr 1e-3 3e-3 --seed 1 2"], exact_match, tune="loss on held-out responses"
    )
    assert rows[0].lr == 1e-3


def test_a_rate_with_fewer_runs_is_not_chosen(compared, tmp_path):
    compared(["--method lora --lr 1e-3 2e-3 --seed 1 2"], exact_match)
    (tmp_path / "method=lora,lr=0.001,seed=1" / "report.json").unlink()  # failed
    rows, _ = compared([], exact_match)
    assert rows[0].lr == 2e-3 and list(rows[0].scores) == [1, 2]


def test_rows_differ_in_all_flags_but_rate_and_seed_and_two_sweeps_are_reported_together(compared):
    words = ["--method lora pissa --rank 4 8 --seed 1 2", "--method ba-lora --rank 4 8 --lambda1 0 0.5 --seed 1 2"]
    rows, _ = compared(words, exact_match)
    assert [row.label for row in rows] == [
        *(f"{method}, rank {rank}" for method in ("lora", "pissa") for rank in (4, 8)),
        *(f"ba-lora, rank {rank}, lambda1 {weight}" for rank in (4, 8) for weight in (0, 0.5)),
    ]
    assert baseline_of(rows[-1], rows, "pissa").label == "pissa, rank 8"
    assert baseline_of(rows[4], rows, "lora").label == "lora, rank 4"
    assert baseline_of(rows[0], rows, "pissa, rank 8").label == "pissa, rank 8"
    assert baseline_of(rows[0], rows, "ba-lora") is None  # two agree


def test_an_unknown_baseline_or_measurement_is_refused(compared, refuses):
    rows, _ = compared(["--method lora --seed 1 2"], exact_match)
    refuses(lambda: baseline_of(rows[0], rows, "pissa"), "--baseline pissa", "lora")
    refuses(lambda: compared([], exact_match, score="BLEU"), "--score BLEU", "exact match, all (9)")


def test_a_classifier_is_tuned_on_its_dev_set_and_scored_on_the_last_set(compared, tmp_path):
    report = {"dev_metric": ["accuracy", "f1"], "epochs": [{"step": 1, "dev": 0.5}, {"step": 2, "dev": None}]}
    report |= {name: {"dev.tsv": {"accuracy": 0.6, "f1": 0.1}, "test.tsv": {"accuracy": 0.7, "f1": 0.2}}
               for name in ("before", "after")}  # fmt: skip
    finish(tmp_path, NLU, "--seed 1 2", report=report)
    rows, measurements = compared([], None)
    assert (measurements.score, measurements.tune, measurements.forgotten) == ("test.tsv: accuracy", "dev", None)
    assert rows[0].scores == {1: 0.7, 2: 0.7} and rows[0].rates[rows[0].lr][0].after["dev"] == 0.5


def test_a_set_whose_file_is_named_like_a_loss_is_better_if_it_is_higher(compared, tmp_path):
    def after(settings):
        return {name: {"accuracy": settings["lr"]} for name in ("loss.tsv", "KLUE.tsv")}

    finish(tmp_path, NLU, "--lr 1e-3 2e-3", after, {"before": {}, "dev_metric": ["accuracy"]})
    rows, measurements = compared([], None)
    assert (measurements.score, measurements.forgotten, rows[0].lr) == ("KLUE.tsv: accuracy", None, 2e-3)


@pytest.mark.parametrize("name, content", [
    ("run.json", None), ("run.json", {}), ("report.json", {"before": []}), ("report.json", {"epochs": [{"step": 1}]}),
    ("report.json", {"before": {"dev.tsv": {"f1": "0.5"}}, "after": {"dev.tsv": {"f1": 0.5}}}),
    ("../sweep.json", {"runs": []}), ("../sweep.json", {}), ("../sweep.json", {"runs": {"a": 1}}),
    ("../sweep.json", {"tune_seeds": 3}),
])  # fmt: skip
def test_a_damaged_file_is_refused_by_its_name(tmp_path, refuses, name, content):
    finish(tmp_path, NLU, "--seed 1 2")
    path = tmp_path / "method=ba-lora,seed=2" / name
    path.unlink()
    if content is not None:
        write_json(path, content)
    refuses(lambda: main(["--out", str(tmp_path), "--report"]), path.name)
    assert not (tmp_path / "table.csv").exists()


def test_points_and_lines_of_the_pictures(compared):
    def after(settings):
        return exact_match(settings) | {"loss on pre-training text": 0.5 + settings["lr"]}

    words = ["--method pissa --lr 1e-3 2e-3 --seed 1 2", "--method ba-lora --lambda1 0.5 1 --lr 1e-3 --seed 1"]
    rows, measurements = compared(words, after)
    assert measurements.forgotten == "loss on pre-training text"
    assert frontier_points(rows, measurements) == {}  # not measured before training
    lines = lines_over("lambda1", rows)
    assert [point[:2] for point in lines["pissa"]] == [(0, 71.5)]
    assert [point[:2] for point in lines["ba-lora"]] == [(0.5, 76), (1, 76)]
    assert [point[:2] for point in lines_over("lr", rows)["pissa"]] == [(1e-3, 71.5), (2e-3, 70.5)]
    assert lines_over("seed", rows) == lines_over("rank", rows) == {}


def test_only_the_picture_over_rates_has_runs_with_tune_seeds(tmp_path):
    def after(settings):
        return rises_with_rate(settings) | {"loss on held-out responses": settings["seed"]}

    report = {"before": {"exact match, all (9)": 0.0, "loss on held-out responses": 0.0}}
    finish(tmp_path, NLG, "--method lora --rank 4 8 --lr 1e-3 2e-3 --seed 101 102", after, report)
    finish(tmp_path, NLG, "--method lora --rank 4 8 --lr 2e-3 --seed 1 2", after, report)
    runs = recorded_runs(tmp_path)
    results = read_results(tmp_path, runs)
    measurements = choose_measurements(results, None, None, "loss on held-out responses")
    rows = rows_of(results, varied_flags(runs), measurements, [101, 102])
    assert [point[:2] for point in lines_over("lr", rows)["lora, rank 4"]] == [(1e-3, 50.5), (2e-3, 51.5)]
    assert [point[:2] for point in lines_over("rank", rows)["lora"]] == [(4, 50.5), (8, 50.5)]
    assert frontier_points(rows, measurements)["lora"].tolist() == [[1, 50], [2, 51]] * 2


def test_pictures_are_left_out_with_a_line_where_matplotlib_is_missing(compared, tmp_path, monkeypatch, capsys):
    compared(["--method lora --rank 4 8"], exact_match)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--out", str(tmp_path), "--report"]) == 0
    assert "pip install '.[plots]'" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


def test_pictures_are_saved(compared, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    compared(["--method lora pissa --rank 4 8 --seed 1 2"], exact_match)
    assert main([str(NLG), *"--method lora pissa --rank 4 8 --seed 1 2 --report --out".split(), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"saved to {tmp_path / 'score-over-rank.png'}" in printed and "did not measure what they forgot" in printed
    assert (tmp_path / "score-over-rank.png").read_bytes().startswith(b"\x89PNG")
