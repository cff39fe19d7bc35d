"""From a folder as Hugging Face hands it out to a model, and back; tokenizers."""
