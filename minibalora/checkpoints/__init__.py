"""Read models and tokenizers from folders in Hugging Face's format; write adapters and merged checkpoints."""

from pathlib import Path

BUILT_IN = Path(__file__).parents[1] / "toy"  # holds the built-in checkpoints
