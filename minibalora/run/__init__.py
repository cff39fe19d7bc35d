"""The machinery of a training run, around its loop."""
