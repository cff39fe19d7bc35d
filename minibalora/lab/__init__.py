"""A controlled test of the method: the same tiny models, pre-trained on text with and without defects, and fine-tuned
in full and by LoRA, PiSSA, DoRA and BA-LoRA, each with its learning rate tuned."""
