"""BA-LoRA in plain PyTorch: bias-alleviating low-rank adaptation, arXiv 2408.04556."""

from minibalora.adapter_io import load_adapter, save_adapter
from minibalora.checkpoint_io import save_model
from minibalora.errors import InputError
from minibalora.lowrank import LowRankLinear, adapt, merge, pretrained, truncate
from minibalora.text import load_tokenizer
from minibalora.weights import load_model
