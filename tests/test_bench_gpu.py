"""bench_gpu.py as far as a CPU takes it, on a tiny shape: its own code, not the numbers."""

import sys

import bench_gpu
import pytest

TINY = ["--device", "cpu", "--shape", "tiny"]


@pytest.mark.parametrize(("part", "lines"), [
    ("memory", ["ba-lora iclr2026"]), ("loading", ["load 2 layers", "all layers"]), ("generation", ["merged"]),
])  # fmt: skip
def test_a_part_prints_its_table(part, lines, in_command):
    status, out, error = in_command(bench_gpu.main, *TINY, "--part", part)
    assert status == 0, error
    assert all(line in out for line in lines)


def test_the_parts_after_a_failed_one_still_run(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [bench_gpu.__file__, *TINY])
    parts = {"check": (bench_gpu.check, 0.1), "generation": (bench_gpu.measure_generation, 100)}
    monkeypatch.setattr(bench_gpu, "PARTS", parts)
    assert bench_gpu.main() == 1
    out = capfd.readouterr().out
    assert "check: FAILED, longer than 0.1 s" in out and "unmerged" in out and out.endswith("failed: check\n")
