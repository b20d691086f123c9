"""Loss, optimiser, step, loop, checkpoints."""
