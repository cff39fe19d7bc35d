"""Read rows from data files, and make batches of them."""

from minibalora.data.batches import Row, encode_examples, pack
from minibalora.data.prompts import Example, read_examples

__all__ = ["Example", "Row", "encode_examples", "pack", "read_examples"]
