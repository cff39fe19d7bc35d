"""`python -m minibalora COMMAND`, or `minibalora COMMAND` where it is installed. Without a command: a list of them."""

import sys
from importlib import import_module

from minibalora.base.cli import run_script
from minibalora.base.errors import InputError

COMMANDS = {  # a module with a `main`, which reads sys.argv, and what it is for
    "generate": ("evaluation.generate", "let a model answer prompts"),
    "evaluate": ("evaluation.evaluate", "GSM8K, MATH, HumanEval, MBPP, perplexity"),
    "classify": ("evaluation.predictions", "label new texts with a classifier; files for GLUE's server"),
    "export": ("checkpoints.export", "merge an adapter into its base, or make it smaller"),
    "plan": ("run.plan", "what training a model takes, from its config.json alone"),
    "plot": ("evaluation.plot", "pictures of runs and of features"),
    "bench": ("run.bench", "what a training step costs on this machine"),
}
SMALLER = {"bench": "lower --micro-batch-size, add --grad-checkpoint or give --forms fused"}
GOES_ON = {"evaluate": "give the same command to go on"}


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
