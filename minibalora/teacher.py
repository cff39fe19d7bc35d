"""What the pre-trained model makes of a step's rows, on the student's own weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from minibalora.data import Packed
from minibalora.lowrank import pretrained
from minibalora.models.decoder import Decoder


def teacher_states(model: Decoder, packed: Callable[..., Tensor], batches: list[Packed]) -> list[Tensor]:
    """The pre-trained model's final hidden states (M, d) of each micro-batch; their logits would be V/d larger."""
    with pretrained(model), torch.inference_mode():
        return [packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared) for batch in batches]
