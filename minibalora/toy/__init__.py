"""The built-in default: a tiny LLaMA, its tokenizer, and arithmetic word problems, so that nothing need be downloaded.

`problems.py` writes the problems, `pretrain.py` is the program that made the files in `llama/`.
"""

from pathlib import Path

MODEL = Path(__file__).with_name("llama")
