"""Train the built-in BERT and its tokenizer from scratch: `python -m minibalora.toy.pretrain_bert --out folder`.

This program made `bert/`, with other random masks. The corpus is `reviews.corpus`, whose rates of defects are flags.
The model's shape comes from `bert/config.json`. The model learns to predict masked words (arXiv 1810.04805, section
3.1), without next-sentence prediction. Only the backbone is saved; fine-tuning starts with a new pooler and classifier.
"""

import json
import shutil
import string
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from minibalora.base import cli
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.tokenizer import load_tokenizer
from minibalora.checkpoints.weights import Checkpoint
from minibalora.data.glue import LabelledText
from minibalora.data.labelled import ClassRow, encode, padded
from minibalora.models.encoder import Bert
from minibalora.toy import BERT
from minibalora.toy.pretrain import CORPUS_ROWS, CORPUS_SEED, begin, finish, parse_flags, train
from minibalora.toy.reviews import CROWDING_RATE, corpus

CONFIG = read_family(BERT)[1]
SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
CLS, SEP, MASK = 2, 3, 4  # their indices in SPECIALS, which are their token ids
LEARNING_RATE = 1e-3


class MaskedLM(nn.Module):
    """A BERT without pooler, whose output layer is the transposed word embedding."""

    def __init__(self, folder: Path):
        super().__init__()
        family, self.config = read_family(folder)
        self.checkpoint = Checkpoint(folder, family)
        self.bert = Bert(self.config)
        del self.bert.pooler
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_types: Tensor, wanted: Tensor) -> Tensor:
        """Return logits (M, V) of the M positions where `wanted` (B, T) is true."""
        states = self.bert(input_ids, attention_mask, token_types)[wanted]
        return states @ self.bert.embeddings.word_embeddings.weight.T


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """Save a lower-casing WordPiece tokenizer with a piece for each word of the texts, and letters for other words."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = string.ascii_lowercase + string.digits
    words |= {*letters, *string.punctuation, *(f"##{letter}" for letter in letters)}
    vocabulary = {piece: index for index, piece in enumerate([*SPECIALS.values(), *sorted(words)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIALS.values()))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True} | SPECIALS
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def masked(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Choose 15 % of the tokens (B, T), no special ones; replace 80 % of them by [MASK], 10 % by a random word.

    Returns the new ids (B, T), and True (B, T) for the chosen tokens, which the model must predict.
    """
    chosen = (torch.rand_like(input_ids, dtype=torch.float) < 0.15) & (input_ids >= len(SPECIALS))
    draw = torch.rand_like(input_ids, dtype=torch.float)
    random_word = torch.randint_like(input_ids, len(SPECIALS), CONFIG.vocab_size)
    masked_ids = torch.where(chosen & (draw < 0.8), MASK, input_ids)
    return torch.where(chosen & (draw >= 0.9), random_word, masked_ids), chosen


def pretraining_loss(model: MaskedLM, rows: list[ClassRow]) -> Tensor:
    """Return the mean cross-entropy of the chosen tokens."""
    (input_ids, attention_mask, token_types), _ = padded(rows, model, next(model.parameters()).device)
    masked_ids, chosen = masked(input_ids)
    return F.cross_entropy(model(masked_ids, attention_mask, token_types, chosen), input_ids[chosen])


def main() -> int:
    args = parse_flags("python -m minibalora.toy.pretrain_bert", __doc__, 3000, CROWDING_RATE, 0.0)
    if not begin(args):
        return 0
    texts = corpus(CORPUS_ROWS, CORPUS_SEED, args.crowding, args.wrong)
    reviews = [LabelledText((text,), 0, line) for line, text in enumerate(texts, start=1)]
    with TemporaryDirectory() as folder:  # save_model copies config and tokenizer from here
        make_tokenizer(texts[:20_000], Path(folder))  # has every word of a corpus, whatever its rates
        shutil.copy(BERT / "config.json", folder)
        rows, _ = encode(reviews, load_tokenizer(folder), CONFIG.max_position_embeddings)
        torch.manual_seed(CORPUS_SEED)
        model = MaskedLM(Path(folder)).to(args.device).eval()  # no dropout: hardly any review comes twice
        train(model, pretraining_loss, rows, args.steps, LEARNING_RATE, args.out)
        finish(model, args.out)
    return 0


if __name__ == "__main__":
    cli.run_script(main)
