"""Rows of data files, and the batches made of them."""

from minibalora.data.batches import Row, encode_examples, pack
from minibalora.data.prompts import Example, read_examples

__all__ = ["Example", "Row", "encode_examples", "pack", "read_examples"]
