"""The program that made `bert/`: `python -m minibalora.toy.pretrain_bert --out folder`, a WordPiece and a tiny BERT.

Both are trained from scratch on `reviews.corpus`, the model in the shape of `bert/config.json` and by guessing masked
words (arXiv 1810.04805, section 3.1, without next-sentence prediction). Only the backbone is saved: pooler and
classifier are new in fine-tuning.
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

from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.merged import save_model
from minibalora.checkpoints.tokenizer import load_tokenizer
from minibalora.checkpoints.weights import Checkpoint
from minibalora.data.glue import LabelledText
from minibalora.data.labelled import ClassRow, encode, padded
from minibalora.models.encoder import Bert
from minibalora.toy import BERT
from minibalora.toy.pretrain import CORPUS_ROWS, CORPUS_SEED, parse_flags, train
from minibalora.toy.reviews import corpus

CONFIG = read_family(BERT)[1]
SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
CLS, SEP, MASK = 2, 3, 4  # their places among the specials
LEARNING_RATE = 1e-3


class MaskedLM(nn.Module):
    """A BERT without pooler; logits come from the word embedding."""

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
        """Logits (M, V) of the M positions where `wanted` (B, T) is true."""
        states = self.bert(input_ids, attention_mask, token_types)[wanted]
        return states @ self.bert.embeddings.word_embeddings.weight.T


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """Lower-cased WordPiece whose pieces are the words of the texts, and letters and digits for all other words."""
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
    """The ids (B, T) as the model sees them, and which of them it is to guess: 15 %, none of a special token.

    Of these, 80 % are replaced by [MASK], 10 % by any word, and 10 % stay.
    """
    chosen = (torch.rand_like(input_ids, dtype=torch.float) < 0.15) & (input_ids >= len(SPECIALS))
    fate = torch.rand_like(input_ids, dtype=torch.float)
    any_word = torch.randint_like(input_ids, len(SPECIALS), CONFIG.vocab_size)
    seen = torch.where(chosen & (fate < 0.8), MASK, input_ids)
    return torch.where(chosen & (fate >= 0.9), any_word, seen), chosen


def pretraining_loss(model: MaskedLM, rows: list[ClassRow]) -> Tensor:
    """Mean cross-entropy of the words to guess."""
    (input_ids, attention_mask, token_types), _ = padded(rows, model, next(model.parameters()).device)
    seen, chosen = masked(input_ids)
    return F.cross_entropy(model(seen, attention_mask, token_types, chosen), input_ids[chosen])


def main() -> None:
    args = parse_flags(__doc__, steps=3000)
    texts = corpus(CORPUS_ROWS, CORPUS_SEED)
    reviews = [LabelledText((text,), 0, line) for line, text in enumerate(texts, start=1)]
    with TemporaryDirectory() as folder:  # the model's source, from which save_model copies config and tokenizer
        make_tokenizer(texts[:20_000], Path(folder))
        shutil.copy(BERT / "config.json", folder)
        rows, _ = encode(reviews, load_tokenizer(folder), CONFIG.max_position_embeddings)
        torch.manual_seed(CORPUS_SEED)
        model = MaskedLM(Path(folder)).to(args.device).eval()  # no dropout: it sees hardly any review twice
        train(model, pretraining_loss, rows, args.steps, LEARNING_RATE)
        save_model(model.to(torch.bfloat16), args.out)


if __name__ == "__main__":
    main()
