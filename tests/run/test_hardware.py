"""Tests of what --grad-checkpoint relies on."""

import pytest
import torch
from helpers import CLASSIFIERS, GOLDEN, LANGUAGE_MODELS, SEQ2SEQ, golden_example

import minibalora as mb
from minibalora.run.hardware import has_dropout


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *SEQ2SEQ, *CLASSIFIERS])
def test_a_model_without_dropout_in_its_config_draws_no_random_numbers(name):
    """So gradient checkpointing need not restore the random state before it recomputes a block."""
    *inputs, _ = golden_example(name)
    model = mb.load_model(GOLDEN / name, head="classifier" if name in CLASSIFIERS else "lm").train()
    before = torch.get_rng_state()
    model(*inputs)
    assert has_dropout(model) or torch.equal(torch.get_rng_state(), before)


def test_dropout_is_seen_in_the_config():
    assert [name for name in LANGUAGE_MODELS if has_dropout(mb.load_model(GOLDEN / name))] == ["gpt2"]
