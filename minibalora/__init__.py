"""BA-LoRA in plain PyTorch: bias-alleviating low-rank adaptation, arXiv 2408.04556."""

from minibalora.base import interrupts  # before the imports that take seconds

# isort: split
from minibalora import fused, objective, regularizers
from minibalora.base import errors
from minibalora.base.errors import InputError
from minibalora.checkpoints.adapters import load_adapter, save_adapter
from minibalora.checkpoints.merged import save_model
from minibalora.checkpoints.tokenizer import load_tokenizer
from minibalora.checkpoints.weights import load_model
from minibalora.lowrank import LowRankLinear, adapt, merge, pretrained
from minibalora.truncate import truncate
