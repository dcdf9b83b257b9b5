"""What every training shares: folder, log, checkpoints, randomness, interruption, progress."""
