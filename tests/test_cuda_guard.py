"""Check without a GPU what CUDA would refuse or be slow at: mixed devices, and lines that make the host wait.

While the host waits for a number, it launches no kernel, and then the GPU is idle until the next ones arrive. So each
wait must be in the tables below. `gpu_guard.py` runs the scripts on an imitation of a GPU and counts them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch can't make a device in Python",
)

# File -> waits of a step of two micro-batches, from update to update, beside those of one model.
STEP = {"minibalora/run/loop.py": 1}  # the losses, terms and norm, for the log and the check that they are finite
NLU = {"minibalora/regularizers.py": 2}  # svdvals, in the spectral term of each micro-batch, checks that it converged
STEPS = {
    "llama3": {},
    "gpt2": {"train_nlg.py": 1},  # the teacher's entropy, which sets λ1 (--adaptive-lambda1)
    "t5": {},
    "gemma2": {},
    # A layer's experts get as many rows as the router says: 2 layers of teacher and student, 2 micro-batches.
    "mixtral": {"minibalora/models/mixture.py": 8},
    "bert": NLU,
    "deberta": NLU,
}
# File -> waits in the evaluation of two batches: for the loss of each, or for its logits.
LOSS, LOGITS = {"minibalora/evaluation/perplexity.py": 2}, {"minibalora/evaluation/class_scoring.py": 2}
EVALUATIONS = dict.fromkeys(STEPS, LOSS) | {
    "mixtral": LOSS | {"minibalora/models/mixture.py": 4},
    "bert": LOGITS,
    "deberta": LOGITS,
}
# File -> waits for a token in generation, the most likely or a drawn one: the token itself, which may end a text.
TOKEN = {"minibalora/evaluation/decoding.py": 1}
EXPERTS = {"minibalora/models/mixture.py": 2}


def report(*names: str) -> dict:
    """Return what gpu_guard.py prints about models or plants, from a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_guard.py")), *names]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_host_waits_for_a_gpu_only_where_it_must():
    """The losses equal those of a run on the CPU to rounding, so the imitation ran the same program."""
    reports = report(*STEPS)
    assert {name: each["step"] for name, each in reports.items()} == {name: STEP | own for name, own in STEPS.items()}
    assert {name: each["evaluation"] for name, each in reports.items()} == EVALUATIONS
    for name in STEPS.keys() - {"bert", "deberta"}:
        experts = EXPERTS if name == "mixtral" else {}
        assert reports[name]["greedy"] == TOKEN | experts, name
        assert reports[name]["drawn"] == TOKEN | experts, name
    for name, each in reports.items():
        on_cpu, on_gpu = each["losses"]
        assert on_gpu == pytest.approx(on_cpu, rel=1e-3), name  # bfloat16; attention is computed in another order


def test_a_planted_mistake_is_seen():
    """`.item()` and `.cpu()` on the teacher's states in train_nlg.py, and a tensor on the CPU in their place."""
    reports = report("item", "cpu", "device")
    for plant in ("item", "cpu"):
        assert reports[plant] == STEP | STEPS["llama3"] | {"train_nlg.py": 2}, plant
    assert "same device" in reports["device"]
