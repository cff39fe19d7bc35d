"""From a folder as Hugging Face hands it out to a model, and back; tokenizers."""

from pathlib import Path

BUILT_IN = Path(__file__).parents[1] / "toy"  # the built-in checkpoints
