"""The laboratory's experiment: its models, fine-tuning data, methods and seeds, as commands for `sweep`."""

from dataclasses import dataclass, field
from pathlib import Path

from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective
from minibalora.toy import BERT, MODEL, reviews

ROOT = Path(__file__).parents[2]
WEIGHTS = ("lambda1", "lambda2", "lambda3")
NON_TARGET_KL = 0.1
BUILT_IN = "built-in"  # its corpora have the defects that the toy models' README describes


@dataclass(frozen=True)
class Task:
    """A model and what it learns."""

    name: str
    script: Path
    words: tuple[str, ...]  # its flags in every run
    model: Path  # a finished one
    model_name: str  # as in a cell's pre-training
    recipes: dict[str, Objective]
    rates: dict[str, tuple[float, ...]]  # method -> learning rates to choose from
    # Of a run; here and below with one such process on each of two cores of an AMD EPYC with AVX-512. MiniLM's are
    # from one without, where the others take 1.4 to 1.8 times as long.
    seconds: float
    # Score -> the measurements in report.json whose mean it is; {}: a LLaMA's, see `results`.
    scores: dict[str, list[str]] = field(default_factory=dict)
    tune: str | None = None  # the measurement that chooses the rate; None: the score on the dev set
    draws_wrong: bool = False  # a run draws which labels are wrong, by its seed; False: wrong.jsonl has them
    rank: int | None = None  # of the adapters; None: the script's default
    svd_k: int | None = None  # of the spectral term alone, where the published one would be constant
    program: str | None = None  # the module that pre-trains a tiny model
    pretraining: tuple[str, ...] = ()  # its flags
    # pre-training -> share of the most frequent kind, share of wrong answers
    corpora: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds_of_pretraining: float = 0


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune: an adapter, and what is added to the loss."""

    name: str
    method: str
    recipe: str | None = None
    weights: tuple[str, ...] = WEIGHTS  # of the recipe; the others are 0
    non_target_kl: float = 0.0

    @property
    def has_weights(self) -> bool:
        return self.recipe is not None or self.non_target_kl > 0


@dataclass(frozen=True)
class Size:
    """How much of the experiment is done."""

    cells: dict[str, tuple[tuple[str, str], ...]]  # task -> pairs of pre-training and fine-tuning data
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    factors: tuple[int, ...] = (1,)  # of the published weights
    factor_cells: tuple[tuple[str, str, str], ...] = ()  # task and pair with all factors; the others have 1


@dataclass(frozen=True)
class Sweep:
    """One arm in one cell: its rate is tuned, then it is run with every seed."""

    task: Task
    pretraining: str
    finetuning: str
    arm: Arm
    factor: int
    seeds: tuple[int, ...]

    def folder(self, out: Path) -> Path:
        arm = f"{self.arm.name} x {self.factor}" if self.arm.has_weights else self.arm.name
        return out / "runs" / self.task.name / f"{self.pretraining}, {self.finetuning}" / arm

    @property
    def rates(self) -> tuple[float, ...]:
        return self.task.rates[self.arm.method]

    @property
    def tune_seeds(self) -> tuple[int, ...]:
        """The seeds of the runs that choose a rate, which do not count: several where the paper's strongest claim is
        tested, elsewhere one, to save time."""
        return TUNE_SEEDS if self.finetuning == "imbalanced" and self.factor == 1 else TUNE_SEEDS[:1]

    @property
    def run_count(self) -> int:
        return len(self.rates) * len(self.tune_seeds) + len(self.seeds)


def rates_of(full: tuple[float, ...], lora: tuple[float, ...], pissa: tuple[float, ...]) -> dict[str, tuple]:
    """Return the rates of the methods by their start: PiSSA's factors are large, so its rates are lower than LoRA's."""
    return {"full": full, "lora": lora, "dora": lora, "pissa": pissa, "ba-lora": pissa}


THIRD = 1 / 3
BERT_WORDS = "--epochs 1 --max-length 64 --task custom --text-field text --label-field label"
BERT_SCORES = {
    "test": ["test.jsonl: accuracy"],
    "other": ["other.jsonl: accuracy"],
    **{f"recall of {label}": [f"test.jsonl: recall of {label}"] for label in reviews.TASK.labels},
    "effective rank": ["test.jsonl: effective rank of them"],
}
TASKS = {
    "bert": Task("bert", ROOT / "train_nlu.py", tuple(BERT_WORDS.split()), BERT, BUILT_IN, NLU_RECIPES,
                 rates_of((2.5e-4, 5e-4, 1e-3, 2e-3), (1e-3, 2e-3, 4e-3, 8e-3), (5e-4, 1e-3, 2e-3, 4e-3)), 7,
                 scores=BERT_SCORES, draws_wrong=True, svd_k=1, program="minibalora.toy.pretrain_bert",
                 pretraining=("--steps", "2000", "--lr", "3e-3", "--mask-stars"),
                 corpora={"clean": (THIRD, 0.0), "noisy": (THIRD, 0.2), "imbalanced": (0.98, 0.0)},
                 seconds_of_pretraining=240),
    "llama": Task("llama", ROOT / "train_nlg.py", ("--max-length", "256"), MODEL, BUILT_IN, NLG_RECIPES,
                  rates_of((2e-5, 5e-5, 1.5e-4, 5e-4), (3e-4, 8e-4, 2e-3, 5e-3), (4e-5, 1e-4, 2.5e-4, 6e-4)), 11,
                  tune="exact match, dev (32)", rank=16, program="minibalora.toy.pretrain",
                  pretraining=("--steps", "600"),
                  corpora={"clean": (0.25, 0.0), "noisy": (0.25, 0.6), "imbalanced": (0.9, 0.0)},
                  seconds_of_pretraining=490),
}  # fmt: skip
ARMS = (
    Arm("full", "full"),
    Arm("lora", "lora"),
    Arm("pissa", "pissa"),
    Arm("dora", "dora"),
    Arm("ba-lora 2024", "ba-lora", "2024"),
    Arm("ba-lora iclr2026", "ba-lora", "iclr2026"),
    Arm("pissa + consistency", "ba-lora", "iclr2026", ("lambda1",)),
    Arm("pissa + diversity", "ba-lora", "iclr2026", ("lambda2",)),
    Arm("pissa + spectral", "ba-lora", "iclr2026", ("lambda3",)),
    Arm("lora + iclr2026", "lora", "iclr2026"),
    Arm("lora + non-target KL", "lora", non_target_kl=NON_TARGET_KL),
)
TUNE_SEEDS = (101, 102, 103)
PRETRAININGS = ("clean", "noisy", "imbalanced")
BERT_CELLS = tuple((pretraining, data) for data in ("wrong", "clean") for pretraining in PRETRAININGS)
LLAMA_CELLS = (("noisy", "wrong"), ("noisy", "clean"))  # all would take more than three hours
FULL = Size(
    {"bert": (("clean", "imbalanced"), *BERT_CELLS), "llama": LLAMA_CELLS},
    tuple(arm.name for arm in ARMS),
    tuple(range(1, 9)),
    (1, 10, 100),
    (("bert", "clean", "imbalanced"), ("llama", "noisy", "wrong")),
)
QUICK_CELLS = ((BUILT_IN, "wrong"),)
QUICK = Size({"bert": QUICK_CELLS, "llama": QUICK_CELLS}, ("lora", "pissa", "ba-lora iclr2026"), (1, 2, 3, 4, 5))


def sweeps_of(size: Size, tasks: dict[str, Task] = TASKS) -> list[Sweep]:
    """Return the sweeps of a size, the published weights first, so that a stopped experiment has the main tables."""
    return [
        Sweep(tasks[task], pretraining, finetuning, arm, factor, size.seeds)
        for factor in size.factors
        for task, cells in size.cells.items()
        for pretraining, finetuning in cells
        for arm in ARMS
        if arm.name in size.arms
        and (factor == 1 or (arm.has_weights and (task, pretraining, finetuning) in size.factor_cells))
    ]


def pretraining_of(task: Task, name: str, folder: Path) -> list[str]:
    """Return the words after `python -m` that pre-train a model in `folder`."""
    crowding, wrong = task.corpora[name]
    rates = ["--crowding", repr(crowding), "--wrong", repr(wrong)]
    return [task.program, "--out", str(folder), *task.pretraining, *rates]


def models_of(sweeps: list[Sweep], out: Path) -> dict[Path, tuple[Task, str]]:
    """Return each model's folder, task and pre-training: the finished model, or one for each corpus of the task, even
    if no sweep uses it, so that the defects can be compared."""
    models = {}
    for sweep in sweeps:
        task = sweep.task
        names = (task.model_name,) if sweep.pretraining == task.model_name else task.corpora
        models |= {model_of(task, name, out): (task, name) for name in names}
    return models


def model_of(task: Task, pretraining: str, out: Path) -> Path:
    return task.model if pretraining == task.model_name else out / "models" / f"{task.name}-{pretraining}"


def words_of(sweep: Sweep, out: Path) -> list[str]:
    """Return the words after `python -m minibalora` of a sweep."""
    arm = sweep.arm
    words = ["sweep", sweep.task.script, "--out", sweep.folder(out), "--tune-seeds", *sweep.tune_seeds]
    words += ["--model", model_of(sweep.task, sweep.pretraining, out), "--method", arm.method, "--lr", *sweep.rates]
    words += ["--seed", *sweep.seeds, *weights_of(sweep), "--batch-size", 16, "--micro-batch-size", 16]
    words += [*sweep.task.words, *data_words(sweep, out / "data" / sweep.task.name)]
    words += ["--tune", sweep.task.tune] if sweep.task.tune else []
    words += ["--rank", sweep.task.rank] if sweep.task.rank and arm.method != "full" else []
    return [str(word) for word in words]


def data_words(sweep: Sweep, data: Path) -> list[object]:
    """Return the flags of what to learn from and to measure on, files in `data`."""
    is_drawn = sweep.finetuning == "wrong" and sweep.task.draws_wrong
    training = data / ("train.jsonl" if sweep.finetuning == "clean" or is_drawn else f"{sweep.finetuning}.jsonl")
    if sweep.task.name == "llama":
        retained = [data / f"{sweep.pretraining}-corpus.jsonl", data / "wrong-answers.jsonl"]
        return ["--data", training, "--eval", data / "test.jsonl", "--retain", *retained]
    noise = ["--label-noise", 0.2] if is_drawn else []
    return ["--data", training, *noise, "--eval", *(data / f"{name}.jsonl" for name in ("dev", "other", "test"))]


def weights_of(sweep: Sweep) -> list[object]:
    """Return the flags of the terms: a recipe and those weights that differ from the published ones, or the non-target
    KL. A published weight is left out because the script refuses some of these flags where labels are scores."""
    arm, words = sweep.arm, []
    if arm.recipe is not None:
        published = sweep.task.recipes[arm.recipe]
        words = ["--recipe", arm.recipe]
        for name in WEIGHTS:
            weight = getattr(published, name)
            chosen = weight * sweep.factor if name in arm.weights else 0
            words += [f"--{name}", f"{chosen:g}"] if chosen != weight else []
    if arm.non_target_kl:
        words += ["--non-target-kl", f"{arm.non_target_kl * sweep.factor:g}"]
    if sweep.task.svd_k and arm.weights == ("lambda3",):
        words += ["--svd-k", sweep.task.svd_k]
    return words
