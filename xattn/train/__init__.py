"""The loop and what it needs: optimiser, checkpoints, ranks."""
