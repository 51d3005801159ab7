"""Training: recipe, step, loop, checkpoints, optimizers."""
