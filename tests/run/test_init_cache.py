"""PiSSA's factors on disk: the same bits as computed, and no file is trusted that belongs to another request."""

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minibalora.lowrank import adapt, factors_of
from minibalora.run import cache, init_cache
from minibalora.run.init_cache import cached_factors

RANK, SCALING, INIT = 3, 1.7, "pissa_krylov_2"


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(70, 90)


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by one entry whenever factors are computed."""
    calls = []

    def counted(init):
        calls.append(init)
        return factors_of(init)

    monkeypatch.setattr(init_cache, "factors_of", counted)
    return calls


def files_in(folder):
    return [path for path in folder.rglob("*") if not path.is_dir()]


def is_same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "pissa_krylov_2"])
def test_a_second_run_gets_the_same_bits_and_computes_nothing(weight, computed, tmp_path, init, dtype):
    weight = weight.to(dtype)
    folder = tmp_path / "new" / "cache"
    first, second = (cached_factors(folder, RANK, SCALING, init, weight) for _ in range(2))
    assert len(computed) == 1 and is_same(first, second)
    assert is_same(first, factors_of(init)(weight, RANK, SCALING))
    (file,) = files_in(folder)
    assert file.suffix == ".safetensors" and not file.stat().st_mode & 0o111


def test_everything_that_the_factors_depend_on_changes_the_file(weight, computed, tmp_path, monkeypatch):
    changed = weight.clone()
    changed[5, 7] += 1e-6
    cases = [
        (RANK, SCALING, INIT, weight),
        (RANK + 1, SCALING, INIT, weight),
        (RANK, SCALING + 1e-9, INIT, weight),
        (RANK, SCALING, "pissa", weight),
        (RANK, SCALING, INIT, changed),
        (RANK, SCALING, INIT, weight.reshape(90, 70)),
        (RANK, SCALING, INIT, torch.zeros(70, 90)),
        (RANK, SCALING, INIT, torch.zeros(70, 90).bfloat16()),
    ]
    for case in 2 * cases:
        assert is_same(cached_factors(tmp_path, *case), factors_of(case[2])(case[3], *case[:2]))
    assert len(computed) == len(cases) == len(files_in(tmp_path))
    monkeypatch.setattr(init_cache, "device_name", lambda device: "another GPU")
    cached_factors(tmp_path, *cases[0])
    assert len(computed) == len(cases) + 1


def rewrite(path, change):
    """Rewrite the file, valid for safetensors, after change(tensors, metadata)."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    path.unlink()
    save_file(tensors, path, metadata=metadata)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "another format": lambda path: path.write_text("{}"),
    "a flipped bit": flip_a_bit,
    "not finite": lambda path: rewrite(path, lambda tensors, _: tensors["A"].fill_(torch.nan)),
    "another shape": lambda path: rewrite(path, lambda tensors, _: tensors.update(B=tensors["B"][:2].clone())),
    "another dtype": lambda path: rewrite(path, lambda tensors, _: tensors.update(A=tensors["A"].double())),
    "a factor missing": lambda path: rewrite(path, lambda tensors, _: tensors.pop("B")),
    "no digest": lambda path: rewrite(path, lambda _, metadata: metadata.clear()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_never_trusted_and_is_rewritten(weight, computed, tmp_path, damage):
    expected = cached_factors(tmp_path, RANK, SCALING, INIT, weight)
    (path,) = files_in(tmp_path)
    whole = path.read_bytes()
    damage(path)
    assert is_same(cached_factors(tmp_path, RANK, SCALING, INIT, weight), expected)
    assert len(computed) == 2 and path.read_bytes() == whole and files_in(tmp_path) == [path]


def test_the_file_of_another_weight_is_never_trusted(weight, computed, tmp_path):
    cached_factors(tmp_path, RANK, SCALING, INIT, weight)
    (path,) = files_in(tmp_path)
    expected = cached_factors(tmp_path, RANK, SCALING, INIT, 2 * weight)
    (other,) = set(files_in(tmp_path)) - {path}
    other.write_bytes(path.read_bytes())
    assert is_same(cached_factors(tmp_path, RANK, SCALING, INIT, 2 * weight), expected) and len(computed) == 3


def test_a_place_that_can_not_be_written_to_is_refused(weight, tmp_path, refuses):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", tmp_path / ("x" * 300)):
        refuses(lambda folder=folder: cached_factors(folder, RANK, SCALING, INIT, weight), folder, "--init-cache")
    cached_factors(tmp_path / "cache", RANK, SCALING, INIT, weight)
    (path,) = files_in(tmp_path / "cache")
    path.unlink()
    path.mkdir()
    refuses(lambda: cached_factors(tmp_path / "cache", RANK, SCALING, INIT, weight), path, "--init-cache")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device (os error 28)")]
)
def test_a_full_disk_is_not_taken_for_a_bad_flag(weight, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cache, "save_file", fail)
    with pytest.raises(type(error), match="No space left"):
        cached_factors(tmp_path, RANK, SCALING, INIT, weight)
    assert not files_in(tmp_path)


def test_a_cached_model_is_the_same_model(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(60, 80), nn.Linear(80, 50))

    plain = adapt(model(), rank=2, init=INIT).state_dict()
    for _ in range(2):
        cached = adapt(
            model(), rank=2, init=INIT, factors=lambda _, weight: cached_factors(tmp_path, 2, 1.0, INIT, weight)
        )
        assert all(torch.equal(value, plain[name]) for name, value in cached.state_dict().items())
