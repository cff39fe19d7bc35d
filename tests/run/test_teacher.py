"""The teacher's states, and which cached files are trusted."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from helpers import GOLDEN, random_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minibalora as mb
from minibalora.base.errors import InputError
from minibalora.data.batches import pack
from minibalora.run import teacher
from minibalora.run.cache import Cache
from minibalora.run.settings import Adaptation, Hardware
from minibalora.run.teacher import open_cache, row_digest, run_cache, teacher_states


@pytest.fixture
def model():
    model = mb.adapt(mb.load_model(GOLDEN / "llama3"), rank=3)
    with torch.no_grad():
        for _, layer in mb.lowrank.adapted_layers(model):
            layer.B += 0.1
    return model


def cache_in(folder, teacher="it"):
    return open_cache(folder, teacher, [], 64)


def missing(cache, rows):
    names = cache.missing([row_digest(row) for row in rows])
    return [row for row in rows if row_digest(row) in names]


def micro_of(rows, size=3):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def states_of(model, rows, cache, size=3):
    """Return the states of each row, and the number of micro-batches that were computed for them."""
    calls, compute = [], model.packed
    model.packed = lambda *batch: calls.append(batch) or compute(*batch)
    micro = micro_of(rows, size)
    batches = [pack(part, "cpu") for part in micro]
    states = teacher_states(model, batches, micro, cache)
    model.packed = compute
    parts = [part for each, batch in zip(states, batches, strict=True) for part in each.split(batch.wanted)]
    return parts, len(calls)


def test_states_come_from_the_model_before_training(model):
    rows = random_rows(7, 0)
    base = mb.load_model(GOLDEN / "llama3")
    for row, states in zip(rows, states_of(model, rows, None)[0], strict=True):
        whole = base.hidden(torch.from_numpy(row.ids).long()[None])[0]
        assert torch.allclose(states, whole[row.prompt_length - 1 : -1], atol=1e-5)
        assert not states.requires_grad


def test_a_cache_gives_the_same_bits_in_any_order_and_batch(model, tmp_path):
    rows = random_rows(8, 0)
    expected, computed = states_of(model, rows, cache_in(tmp_path))
    assert computed == 3
    cache = cache_in(tmp_path)
    assert missing(cache, rows) == []
    got, computed = states_of(model, rows[::-1], cache, size=2)
    assert computed == 0 and all(torch.equal(a, b) for a, b in zip(got[::-1], expected, strict=True))


def test_only_missing_states_are_computed_and_then_cached(model, tmp_path):
    rows = random_rows(9, 0)
    cache = cache_in(tmp_path)
    assert states_of(model, rows[:6], cache)[1] == 2
    assert len(missing(cache, rows)) == 3
    assert states_of(model, rows, cache)[1] == 1
    assert states_of(model, rows, cache)[1] == 0


def test_states_that_another_process_wrote_meanwhile_are_read_and_not_written_twice(model, tmp_path):
    rows = random_rows(6, 0)
    mine, other = cache_in(tmp_path), cache_in(tmp_path)
    assert states_of(model, rows[:3], other)[1] == 1
    assert states_of(model, rows[:3], mine)[1] == 0
    assert states_of(model, rows[2:5], mine)[1] == 1  # one of these rows is cached
    held = [name for path in tmp_path.rglob("*.safetensors") for name in load_file(path)]
    assert len(held) == len(set(held)) == 5


def test_states_of_another_teacher_or_other_rows_are_never_read(model, tmp_path):
    rows = random_rows(4, 0)
    states_of(model, rows, cache_in(tmp_path))
    assert len(missing(cache_in(tmp_path, "another"), rows)) == 4
    one, *rest = rows
    other_token = dataclasses.replace(one, ids=np.append(one.ids[:-1], (one.ids[-1] + 1) % 61).astype(np.int32))
    longer_prompt = dataclasses.replace(rest[0], prompt_length=rest[0].prompt_length + 1)
    other_line = dataclasses.replace(rest[1], line=99)
    rows = missing(cache_in(tmp_path), [other_token, longer_prompt, other_line])
    assert rows == [other_token, longer_prompt]


@pytest.mark.parametrize(("quantize", "init", "is_shared"), [
    (None, "pissa_niter_4", True), ("nf4", "lora", True), ("nf4", "pissa", False), ("nf4", "pissa_niter_4", False),
])  # fmt: skip
def test_a_quantised_teacher_belongs_to_the_device_that_computed_the_factors(quantize, init, is_shared, tmp_path):
    adaptation, rows = Adaptation("pissa", 3, 3, init, quantize=quantize), random_rows(2, 0)
    here, there = (Hardware(torch.device(device), torch.float32) for device in ("cpu", "meta"))
    caches = [run_cache(tmp_path, GOLDEN / "llama3", rows, adaptation, hardware, 0) for hardware in (here, there)]
    assert (caches[0].folder == caches[1].folder) == is_shared


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def change_a_shape(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name)[:, :-1].contiguous() for name in file.keys()}
        save_file(tensors, path, metadata=file.metadata())


def forget_digests(path):
    with safe_open(path, "pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, path)


DAMAGES = [
    (damage, is_open) for damage in (flip_last_byte, truncate, empty, remove, change_a_shape) for is_open in (0, 1)
]
DAMAGES += [(forget_digests, False)]  # a cache that is open remembers them


@pytest.mark.parametrize("damage, is_open", DAMAGES)
def test_damaged_states_are_recomputed_and_replaced(model, tmp_path, damage, is_open):
    rows = random_rows(3, 0)
    cache = cache_in(tmp_path)
    expected, _ = states_of(model, rows, cache)
    damage(next(tmp_path.rglob("*.safetensors")))
    cache = cache if is_open else cache_in(tmp_path)
    got, computed = states_of(model, rows, cache)
    assert computed == 1 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert states_of(model, rows, cache_in(tmp_path))[1] == 0


def test_files_of_others_in_the_folder_are_left_alone(model, tmp_path):
    cache = cache_in(tmp_path)
    states_of(model, random_rows(3, 0), cache)
    foreign = cache.folder / "mine.safetensors"
    foreign.write_text("not a tensor")
    assert missing(cache_in(tmp_path), random_rows(3, 0)) == []
    assert foreign.read_text() == "not a tensor"


def test_a_disk_without_room_is_refused_before_anything_is_computed(model, tmp_path, monkeypatch):
    rows = random_rows(3, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="--teacher-cache .*free there"):
        open_cache(tmp_path / "new", "it", rows, 64)
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    states_of(model, rows, open_cache(tmp_path / "new", "it", rows, 64))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    open_cache(tmp_path / "new", "it", rows, 64)  # all there, so no room is needed


def test_a_folder_that_cant_be_written_to_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--teacher-cache"):
        open_cache(tmp_path / "file" / "sub", "it", random_rows(3, 0), 64)
    with pytest.raises(InputError, match="--teacher-cache"):
        states_of(model, random_rows(3, 0), Cache(tmp_path / "file", "it", "--teacher-cache"))


def test_a_new_version_does_not_read_files_of_the_old(model, tmp_path, monkeypatch):
    rows = random_rows(3, 0)
    states_of(model, rows, cache_in(tmp_path))
    monkeypatch.setattr(teacher, "VERSION", teacher.VERSION + 1)
    assert missing(cache_in(tmp_path), rows) == rows
