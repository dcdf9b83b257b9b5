"""The common part of every training: folder, log, checkpoints, randomness, interruption, progress."""
