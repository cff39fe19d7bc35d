"""Plain modules, one file a family of architectures, with the tensor names of Hugging Face checkpoints."""

from .decoder import Decoder
from .t5 import T5

LanguageModel = Decoder | T5  # they have head, head_weight, embedding, packed, prefill and decode
