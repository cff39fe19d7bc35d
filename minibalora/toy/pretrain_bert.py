"""The program that made `bert/`: `python -m minibalora.toy.pretrain_bert --out folder`, a WordPiece and a tiny BERT.

Both are trained from scratch on `reviews.corpus`, the model by guessing masked words (arXiv 1810.04805, section 3.1,
without next-sentence prediction). Saved is the backbone alone: pooler and classifier are new in fine-tuning.
"""

import argparse
import json
import string
from pathlib import Path

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
from minibalora.toy.pretrain import BATCH_SIZE, CORPUS_ROWS, CORPUS_SEED, train
from minibalora.toy.reviews import corpus

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
}
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
    any_word = torch.randint_like(input_ids, len(SPECIALS), CONFIG["vocab_size"])
    seen = torch.where(chosen & (fate < 0.8), MASK, input_ids)
    return torch.where(chosen & (fate >= 0.9), any_word, seen), chosen


def pretraining_loss(model: MaskedLM, rows: list[ClassRow]) -> Tensor:
    """Mean cross-entropy of the words to guess."""
    (input_ids, attention_mask, token_types), _ = padded(rows, model, next(model.parameters()).device)
    seen, chosen = masked(input_ids)
    return F.cross_entropy(model(seen, attention_mask, token_types, chosen), input_ids[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help=f"optimisation steps of {BATCH_SIZE} reviews")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    texts = corpus(CORPUS_ROWS, CORPUS_SEED)
    make_tokenizer(texts[:20_000], args.out)
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    reviews = [LabelledText((text,), 0, line) for line, text in enumerate(texts, start=1)]
    rows, _ = encode(reviews, load_tokenizer(args.out), CONFIG["max_position_embeddings"])
    torch.manual_seed(CORPUS_SEED)
    model = MaskedLM(args.out).to(args.device)
    tokens = sum(len(row.ids) for row in rows) / len(rows)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokens:.0f} tokens a review")
    model.eval()  # no dropout: hardly a review is seen twice
    train(model, pretraining_loss, rows, args.steps, LEARNING_RATE)
    save_model(model.to(torch.bfloat16), args.out)


if __name__ == "__main__":
    main()
