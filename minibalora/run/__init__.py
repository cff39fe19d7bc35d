"""What a training run needs around its loop."""
