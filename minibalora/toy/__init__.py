"""The built-in defaults: two tiny models, their tokenizers and their data, so that nothing need be downloaded.

For train_nlg.py a LLaMA and arithmetic word problems: `problems.py` writes them, `pretrain.py` made `llama/`.
For train_nlu.py a BERT and reviews to classify: `reviews.py` writes them, `pretrain_bert.py` made `bert/`.
"""

from minibalora.checkpoints import BUILT_IN

MODEL, BERT = BUILT_IN / "llama", BUILT_IN / "bert"
