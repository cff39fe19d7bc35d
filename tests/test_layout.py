"""Files that can be copied alone, and imports that only go up the design's table."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# design.md's table from the top down: a file may import from its own row and those above.
ROWS = [
    ["krylov", "lowrank", "regularizers", "fused"],
    ["nf4", "lean_product", "truncate", "variants", "objective"],
    ["base"],
    ["models"],
    ["checkpoints"],
    ["data"],
    ["run"],
    ["evaluation"],
    ["sweep"],
    ["toy"],
    ["__main__"],
    ["lab"],
]
COPYABLE = {
    name: {"torch"} for name in ("lowrank", "regularizers", "fused", "krylov", "nf4")
}  # -> the packages that it needs
COPYABLE |= {f"models.{path.stem}": {"torch"} for path in (ROOT / "minibalora" / "models").glob("[!_]*.py")}
COPYABLE |= {"evaluation.answers": set(), "variants": {"torch", "lowrank"}}  # variants: beside lowrank.py
USE = """
import torch
from torch import nn
from fused import FrozenHead, fused_objective
from lowrank import adapt, merge, pretrained
from nf4 import NF4
from regularizers import consistency_kl, diversity_entropy, svd_share
from variants import add_penalty, after_step, before_step, use

model = adapt(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)), rank=2)
x = torch.randn(4, 8)
with pretrained(model):
    teacher = model(x)
student = model(x)
(consistency_kl(student, teacher) + diversity_entropy(student) + svd_share(student, 2)).backward(retain_graph=True)
assert model[0].A.grad is not None
head = FrozenHead(NF4.quantize(torch.randn(7, 5)).dequantize())
loss, terms = fused_objective(student, teacher, torch.arange(4), head, lambda1=1.0, lambda2=1.0, lambda3=1.0)
loss.backward()
assert set(terms) == {"task", "consistency", "diversity", "svd"}
assert torch.equal(merge(model)(x), teacher)
try:
    adapt(nn.Sequential(nn.Linear(8, 8)), 2, init="pissa_krylov_4")
except ValueError as error:
    assert "give lora, olora or pissa" in str(error)

varied = use(adapt(nn.Sequential(nn.Linear(8, 8)), 2, init="lora"), "adalora", target=1)
before_step(varied, 0, seed=0)
varied(x).square().mean().backward()
add_penalty(varied)
after_step(varied, 1, steps=4)

from models.gpt2 import GPT2Config, gpt2

tiny = gpt2(GPT2Config(11, 8, 16, 2, 2, 20, 1e-5, 0.0, 0.0, 0.0, True, 0.02))
assert tiny(torch.arange(6)[None]).shape == (1, 6, 11)
"""


def imports(name: str) -> set[str]:
    path = ROOT / "minibalora" / Path(*name.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):  # relative in files that can be copied into another package
            own = ".".join(["minibalora", *name.split(".")[:-1]])
            module = ".".join(filter(None, [own, node.module])) if node.level else node.module
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def row_of(name: str) -> int | None:
    """Return the row of a file, by its name or its folder's name; None for the package itself."""
    return next((depth for depth, row in enumerate(ROWS) if {name, name.partition(".")[0]} & set(row)), None)


def all_files() -> list[str]:
    package = ROOT / "minibalora"
    names = [".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")]
    return sorted(name.removesuffix(".__init__") for name in names if name != "__init__")


def own_imports(name: str) -> set[str]:
    """Return the files of the package that a file imports."""
    modules = {module.removeprefix("minibalora.") for module in imports(name) if module.startswith("minibalora.")}
    return modules & set(all_files())


@pytest.mark.parametrize("name", all_files())
def test_no_file_imports_from_a_row_below_its_own(name):
    assert row_of(name) is not None, "give it a row"
    assert not [module for module in own_imports(name) if row_of(module) > row_of(name)]


def test_no_imports_go_in_a_circle():
    imported, done = {name: own_imports(name) - {name} for name in all_files()}, set()
    while ready := {name for name, others in imported.items() if name not in done and others <= done}:
        done |= ready
    assert not imported.keys() - done


def test_few_files_stand_directly_in_the_package():
    assert len(list((ROOT / "minibalora").glob("*.py"))) <= 11


@pytest.mark.parametrize("name", COPYABLE)
def test_copyable_files_need_torch_at_most(name):
    others = {module.partition(".")[0] for module in imports(name) if not module.startswith("minibalora.models.")}
    if name in ("lowrank", "variants"):
        others -= {
            "minibalora",
            "krylov",
        }  # krylov.py, only if an init needs it; lowrank.py, beside a copy of variants.py
    assert others - set(sys.stdlib_module_names) == COPYABLE[name]


@pytest.mark.parametrize("name", COPYABLE)
def test_copyable_files_say_their_licence_and_what_they_offer(name):
    source = (ROOT / "minibalora" / Path(*name.split("."))).with_suffix(".py").read_text()
    assert source.startswith("# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there\n")
    assert "\n__all__ = " in source


def test_copyable_files_work_in_an_empty_folder(tmp_path):
    for name in ("lowrank.py", "regularizers.py", "fused.py", "krylov.py", "nf4.py", "variants.py"):
        shutil.copy(ROOT / "minibalora" / name, tmp_path)
    shutil.copytree(ROOT / "minibalora" / "models", tmp_path / "models")
    result = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{USE}"], cwd=tmp_path)
    assert result.returncode == 0


def test_copyable_files_work_in_another_package(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("lowrank.py", "krylov.py", "variants.py", "lean_product.py", "truncate.py"):
        shutil.copy(ROOT / "minibalora" / name, tmp_path / "mine")
    use = "from mine import lean_product, lowrank, truncate, variants; lowrank.factors_of('pissa_krylov_2')"
    code = f"import sys; sys.path.insert(0, '.'); sys.modules['minibalora'] = None\n{use}"
    assert subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path).returncode == 0


def test_nothing_imports_transformers_or_peft_and_nothing_reads_a_pickle():
    for path in [*(ROOT / "minibalora").rglob("*.py"), *ROOT.glob("*.py")]:
        source = path.read_text()
        assert not any(word in source for word in ("import transformers", "import peft", "torch.load(", "pickle.")), (
            path
        )


def test_the_readme_is_short_and_its_file_lengths_and_links_are_right():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200 and lines.index("## The method in four lines") < 40
    text = "\n".join(lines)
    for heading in ("Run it", "Test it"):  # .ci/run takes the only line of its block
        assert re.search(rf"^## {heading}\n\n```bash\n[^\n]+\n```\n\n## ", text, flags=re.M)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    lengths = re.findall(r"^\| \[`\S+`\]\((\S+)\) \| (\d+) \|", text, flags=re.M)
    assert len(lengths) == 4
    for name, length in lengths:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == pytest.approx(int(length), rel=0.1), name
