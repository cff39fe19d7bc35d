"""The built-in defaults: two tiny models with their tokenizers and data, so that nothing needs to be downloaded.

train_nlg.py has a LLaMA (`llama/`, made by `pretrain.py`) and arithmetic word problems (made by `problems.py`).
train_nlu.py has a BERT (`bert/`, made by `pretrain_bert.py`) and reviews to classify (made by `reviews.py`).
"""

from minibalora.checkpoints import BUILT_IN

MODEL, BERT = BUILT_IN / "llama", BUILT_IN / "bert"
