"""Wrong input on the command line: status 2, one line that names the fault, and nothing written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import GOLDEN

from minibalora.run.run_folder import start_run
from minibalora.toy import MODEL

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_nlg  # noqa: E402

ROWS = [{"query": f"What is {n} + 2?", "response": f"The answer is: {n + 2}"} for n in range(4)]
QUICK = ["--method", "lora", "--rank", "2", "--targets", "q_proj", "--max-steps", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Enter a folder with good data, and data broken in several ways."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"query": \n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "fields.jsonl").write_text('{"text": "?"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(in_command):
    """train(*flags) -> status, standard error of train_nlg.py, run in this process."""
    return lambda *flags: in_command(train_nlg.main, "--device", "cpu", *flags)[::2]


def given(*flags, model=str(MODEL), data="data.jsonl"):
    return ["--model", model, "--data", data, *flags]


def assert_refused(status, stderr, *parts):
    assert status == 2, stderr
    assert len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and stderr.endswith("\n"), stderr
    for part in parts:
        assert part in stderr


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


HUGE = "9" * 30
FLAGS = [
    (["--ranks", "8"], ["--ranks", "--help"]),
    (["--ran", "8"], ["--ran"]),
    (["data.jsonl"], ["data.jsonl"]),
    (["--rank"], ["--rank"]),
    *[(["--rank", value], ["--rank", value]) for value in ("0", "-1", "8.5", "x", "", "١", HUGE)],
    (["--rank", "129"], ["--rank", "129", "128"]),
    *[(["--lr", value], ["--lr", value]) for value in ("-1", "0", "nan", "inf", "1e999", "x")],
    (["--lr=-1e-4"], ["--lr", "-1e-4"]),
    *[([flag, "-1"], [flag, "-1"]) for flag in ("--lambda1", "--lambda2", "--lambda3", "--non-target-kl")],
    *[([flag, "0"], [flag, "0"]) for flag in ("--max-steps", "--epochs", "--batch-size", "--micro-batch-size")],
    *[([flag, "0"], [flag, "0"]) for flag in ("--max-length", "--max-rows", "--svd-k", "--save-every")],
    *[([flag, "0"], [flag, "0"]) for flag in ("--alpha", "--temperature", "--grad-clip")],
    *[(["--seed", value], ["--seed", value]) for value in ("-1", "x", HUGE)],
    (["--warmup-ratio", "1.5"], ["--warmup-ratio", "1.5"]),
    (["--recipe", "2025"], ["--recipe", "2025", "iclr2026"]),
    (["--method", "bitfit"], ["--method", "bitfit", "ba-lora"]),
    (["--schedule", "step"], ["--schedule", "step"]),
    (["--dtype", "float16"], ["--dtype", "float16"]),
    *[(["--device", name], ["--device", name]) for name in ("tpu", "cuda:99", "cpu:x", "meta", "hpu")],
    (["--init", "svd"], ["--init", "svd", "pissa"]),
    (["--init", "pissa_krylov_-1"], ["--init", "pissa_krylov_-1"]),
    (["--init-cache", ""], ["--init-cache", "empty"]),
    (["--init-cache", "data.jsonl"], ["--init-cache", "data.jsonl"]),
    (["--init-cache", "data.jsonl/cache"], ["--init-cache", "data.jsonl/cache"]),
    (["--init-cache", "cache", "--method", "lora"], ["--init-cache", "--method lora"]),
    (["--teacher-cache", ""], ["--teacher-cache", "empty"]),
    (["--teacher-cache", "data.jsonl/cache"], ["--teacher-cache", "data.jsonl/cache"]),
    (["--teacher-cache", "cache", "--method", "pissa"], ["--teacher-cache", "--method pissa", "--non-target-kl"]),
    (["--teacher-cache", "cache", "--lambda1", "0"], ["--teacher-cache", "--lambda1 0"]),
    (["--quantize", "nf4", "--compile"], ["--compile", "--quantize"]),
    (["--quantize", "int8"], ["--quantize", "int8", "nf4"]),
    (["--quantize", "nf4", "--method", "full"], ["--quantize", "--method full"]),
    (["--quantize", "nf4", "--adapter-rank", "2"], ["--adapter-rank", "--quantize", "export"]),
    (["--targets"], ["--targets"]),
    (["--targets", "c_attn"], ["--targets", "c_attn", "q_proj"]),
    (["--targets", "q_proj", "lm_head"], ["--targets", "lm_head"]),
    (["--method", "lora", "--init", "pissa"], ["--init pissa", "--method lora"]),
    (["--method", "pissa", "--init", "lora"], ["--init lora", "--method pissa"]),
    (["--method", "lora", "--lambda1", "0.1"], ["--lambda1", "--method lora"]),
    (["--method", "full", "--recipe", "2024"], ["--recipe 2024", "teacher", "--method full"]),
    (["--method", "ba-lora", "--recipe", "none"], ["--recipe none", "--method pissa"]),
    (["--method", "pissa", "--adaptive-lambda1"], ["--adaptive-lambda1", "--method pissa"]),
    (["--method", "full", "--rank", "8"], ["--rank", "--method full"]),
    (["--method", "full", "--targets", "q_proj"], ["--targets", "--method full"]),
    (["--method", "full", "--non-target-kl", "0.1"], ["--non-target-kl", "teacher"]),
    (["--prompt-field", "question"], ["question", "line 1"]),
    (["--max-length", "2"], ["--max-length 2"]),
    (["--eval", "absent.jsonl"], ["absent.jsonl"]),
    (["--eval", "broken.jsonl"], ["broken.jsonl", "line 2"]),
    (["--resume"], ["out", "--resume"]),
]


@pytest.mark.parametrize("flags, parts", FLAGS, ids=lambda value: " ".join(value))
def test_a_wrong_flag_is_refused(train, place, flags, parts):
    before = contents(place)
    assert_refused(*train(*given("--out", "out", *flags)), *parts)
    assert contents(place) == before


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--model", str(MODEL)], ["--data"]),
        (["--data", "data.jsonl"], ["--model"]),
        (["--resume"], ["--out"]),
        (given(data="absent.jsonl"), ["absent.jsonl"]),
        (given(data="."), ["a folder with 4 sets of files"]),
        (given(data="broken.jsonl"), ["broken.jsonl", "line 2"]),
        (given(data="empty.jsonl"), ["empty.jsonl"]),
        (given(data="fields.jsonl"), ["fields.jsonl", "line 1", "text"]),
        (given(data=""), ["--data is empty"]),
        (given(model=""), ["--model is empty"]),
        (["--out", ""], ["--out is empty"]),
        (given(model="absent"), ["absent", "no such folder"]),
        (given(model="data.jsonl"), ["data.jsonl", "no such folder"]),
        (given(model="x" * 300), ["xxx", "no such folder"]),
        (given(model="line\nbreak"), ["line break", "no such folder"]),
        (given(model="meta-llama/Llama-2-7b-hf"), ["meta-llama/Llama-2-7b-hf", "no such folder"]),
        (given("--out", "data.jsonl"), ["data.jsonl"]),
        (given("--out", "data.jsonl/out"), ["data.jsonl/out"]),
    ],
    ids=lambda value: " ".join(value)[-60:],
)
def test_a_wrong_path_is_refused(train, place, flags, parts):
    before = contents(place)
    assert_refused(*train(*flags), *parts)
    assert contents(place) == before


@pytest.fixture
def small_model(place):
    return shutil.copytree(MODEL, place / "small")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_model_is_refused(train, small_model, name):
    (small_model / name).unlink()
    assert_refused(*train(*given("--out", "out", model="small")), "small", name)
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_model_is_refused(train, small_model, name):
    (small_model / name).write_bytes((small_model / name).read_bytes()[:50])
    assert_refused(*train(*given("--out", "out", model="small")), f"small/{name}")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: (path.unlink(), path.mkdir())], ids=["missing", "a folder"]
)
def test_a_missing_shard_is_refused(train, small_model, damage):
    shard = "model-00002-of-00002.safetensors"
    (small_model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": shard}}
    (small_model / "model.safetensors.index.json").write_text(json.dumps(index))
    (small_model / shard).touch()
    damage(small_model / shard)
    assert_refused(*train(*given("--out", "out", model="small")), f"small/{shard}")
    assert not Path("out").exists()


def test_a_tokenizer_of_another_model_is_refused(train, small_model):
    for file in (GOLDEN / "llama2").iterdir():
        shutil.copy(file, small_model)
    assert_refused(*train(*given("--out", "out", model="small")), "small", "61 tokens", "line 1")
    assert not Path("out").exists()


def learned_positions(model: Path, count: int) -> None:
    """Give the folder a GPT-2's config, which is read before the weights."""
    config = json.loads((GOLDEN / "gpt2" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 512, "n_positions": count}))


def test_a_max_length_beyond_learned_positions_is_refused(train, small_model):
    learned_positions(small_model, 40)
    flags = given("--out", "out", "--max-length", "41", model="small")
    assert_refused(*train(*flags), "--max-length 41", "small", "40 positions")
    assert not Path("out").exists()


def test_held_out_rows_beyond_learned_positions_are_refused(train, place, small_model):
    learned_positions(small_model, 256)
    (place / "long.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | {"response": "2 " * 256}))
    flags = given("--out", "out", "--max-length", "256", "--eval", "long.jsonl", model="small")
    assert_refused(*train(*flags), "long.jsonl, line 2", "256 positions")
    assert not Path("out").exists()


def test_an_out_that_cannot_be_made_is_refused(tmp_path, refuses):
    refuses(lambda: start_run(tmp_path / ("x" * 300), {}), tmp_path, "--out")


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", "checkpoint", "adapter_config.json"])
def test_a_used_out_is_refused_and_left_alone(train, place, name):
    (place / "out").mkdir()
    (place / "out" / name).write_text("of another run")
    before = contents(place)
    assert_refused(*train(*given("--out", "out")), "out", name, "--resume")
    assert contents(place) == before


def test_resuming_with_other_settings_is_refused_and_changes_nothing(train, place):
    flags = given("--out", "out", *QUICK)
    assert train(*flags)[0] == 0
    (place / "fewer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    before = contents(place)
    for other, parts in [
        (["--rank", "3"], ["--rank", "3", "2"]),
        (["--seed", "43"], ["--seed"]),
        (["--lr", "1e-3"], ["--lr"]),
        (["--targets", "k_proj"], ["--targets"]),
        (["--method", "pissa"], ["--method"]),
        (["--data", "fewer.jsonl"], ["data_digest"]),
    ]:
        status, stderr = train(*flags, "--resume", *other)
        assert_refused(status, stderr, *parts)
        assert contents(place) == before


@pytest.mark.parametrize("damage", ["run.json", "checkpoint/state.safetensors", "checkpoint/initial.safetensors"])
def test_resuming_from_a_damaged_run_is_refused(train, place, damage):
    flags = given("--out", "out", *QUICK)
    assert train(*flags)[0] == 0
    (place / "out" / damage).write_bytes(b"{")
    before = contents(place)
    status, stderr = train(*flags, "--resume")
    assert_refused(status, stderr, damage.partition("/")[0])
    assert contents(place) == before


def test_the_script_itself_ends_with_status_2_and_one_line(place):
    """Only this test starts a process."""
    command = [sys.executable, str(ROOT / "train_nlg.py"), *given("--out", "out", data="broken.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert_refused(done.returncode, done.stderr)
    assert done.stdout == "" and not (place / "out").exists() and not (place / "runs").exists()


def test_an_eval_task_needs_eval_and_its_own_kind_of_file(place, train):
    assert_refused(*train(*given("--eval-task", "gsm8k")), "--eval-task goes with --eval")
    assert_refused(*train("--raw"), "--template goes with --model and --data")
    (place / "eval.jsonl").write_text(json.dumps({"question": "q", "answer": "no final answer"}) + "\n")
    assert_refused(*train(*given("--eval", "eval.jsonl", "--eval-task", "gsm8k")), "eval.jsonl, line 1", "final answer")
    assert not (place / "runs").exists()
