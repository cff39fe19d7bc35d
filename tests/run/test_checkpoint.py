"""A checkpoint that lacks a file is told apart from a run without a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import minibalora as mb
from minibalora.run import checkpoint
from minibalora.run.checkpoint import keep_best, resumed_step, save_checkpoint, trained_parameters
from minibalora.run.run_folder import check_apart, check_features, check_out


@pytest.fixture
def out(tmp_path) -> Path:
    """The folder of a run that was stopped after step 1 and its evaluation on the dev set."""
    model = mb.adapt(nn.Sequential(nn.Linear(4, 3)), rank=2)
    optimizer = torch.optim.AdamW(trained_parameters(model).values())
    save_checkpoint(tmp_path, model, optimizer, 0)
    for parameter in trained_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, 1)
    keep_best(tmp_path, model, 1, 0.5)
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "dev": 0.5}) + "\n")
    return tmp_path


def lose(out: Path, *names: str) -> None:
    for name in names:
        (out / "checkpoint" / name).unlink()


@pytest.mark.parametrize("name", [checkpoint.INITIAL, checkpoint.STATE, checkpoint.BEST])
def test_a_lost_file_is_named_and_nothing_starts_over(name, out, refuses):
    assert resumed_step(out, {}, 10) == 1
    lose(out, name)
    refuses(lambda: resumed_step(out, {}, 10), out, f"{name} missing", "put it back", "another --out")


def test_two_lost_files_are_both_named(out, refuses):
    lose(out, checkpoint.INITIAL, checkpoint.STATE)
    refuses(lambda: resumed_step(out, {}, 10), f"{checkpoint.INITIAL} and {checkpoint.STATE} missing")


def test_without_any_checkpoint_a_run_starts_over(out):
    lose(out, checkpoint.INITIAL, checkpoint.STATE, checkpoint.BEST)
    assert resumed_step(out, {}, 10) is None


def test_a_run_killed_within_its_first_checkpoint_starts_over(out):
    lose(out, checkpoint.STATE, checkpoint.BEST)
    (out / "log.jsonl").unlink()
    assert resumed_step(out, {}, 10) is None


def test_a_lost_run_json_is_named(out, refuses):
    refuses(lambda: check_out(out, resume=True), out, "run.json missing", "put it back")
    refuses(lambda: check_out(out / "new", resume=True), "holds no run to resume")


def test_the_name_of_features_in_a_new_folder_is_checked(tmp_path, refuses):
    check_features(tmp_path / "out" / "states.safetensors", tmp_path / "out", resume=False)
    refuses(
        lambda: check_features(tmp_path / "out" / ("x" * 253), tmp_path / "out", resume=False), "File name too long"
    )


def test_a_run_in_the_folder_of_its_model_or_data_is_refused(tmp_path, refuses):
    (tmp_path / "link").symlink_to(tmp_path / "model")
    check_apart(tmp_path / "out", tmp_path / "model", None)
    refuses(lambda: check_apart(tmp_path / "link", tmp_path / "model", None), "is also the folder in --model")
    refuses(lambda: check_apart(tmp_path / "data", tmp_path / "model", str(tmp_path / "data")), "folder in --data")
