"""A controlled test of the method: the same tiny models, pre-trained on clean, noisy and imbalanced text, fine-tuned by
every method with its learning rate tuned."""
