"""`python -m minibalora COMMAND`, or `minibalora COMMAND` if it is installed. Without a command, lists all of them."""

import sys
from importlib import import_module

from minibalora.base.cli import run_script
from minibalora.base.errors import InputError

COMMANDS = {  # the module whose `main` reads sys.argv, and the purpose
    "generate": ("evaluation.generate", "answer prompts with a model"),
    "evaluate": ("evaluation.evaluate", "score a model on GSM8K, MATH, HumanEval, MBPP, MT-Bench or a text"),
    "classify": ("evaluation.classify", "label new texts with a classifier; write files for GLUE's server"),
    "export": ("checkpoints.export", "merge an adapter into its base, or reduce its rank"),
    "plan": ("run.plan", "estimate the memory that training needs, from config.json"),
    "plot": ("evaluation.plot", "draw the logs of runs, or t-SNE of features"),
    "bench": ("run.bench", "measure training steps on this machine"),
    "sweep": ("sweep.command", "run a training script for several values of its flags, and compare methods"),
    "lab": ("lab.command", "test what the method does, on tiny models pre-trained on clean and flawed text"),
}
SMALLER = {"bench": "lower --micro-batch-size, add --grad-checkpoint or give --forms fused"}
GOES_ON = dict.fromkeys(("evaluate", "sweep", "lab"), "give the same command to continue")


def main() -> int:
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print("python -m minibalora COMMAND ...; each has --help\n")
        print("\n".join(f"  {name:10}{purpose}" for name, (_, purpose) in COMMANDS.items()))
        return 0
    name = sys.argv[1]
    if name not in COMMANDS:
        raise InputError(f"there is no command {name!r}: give one of {', '.join(COMMANDS)}")
    del sys.argv[1]
    return import_module(f"minibalora.{COMMANDS[name][0]}").main()


def run() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    run_script(main, SMALLER.get(name, "lower --batch-size"), GOES_ON.get(name))


if __name__ == "__main__":
    run()
