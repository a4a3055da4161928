"""Training: objectives, learning rates, optimizers, the loop and its checkpoints."""
