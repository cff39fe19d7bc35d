"""Plain modules, one file a family of architectures, with the tensor names of Hugging Face checkpoints."""
