"""The doctor's look at a run's inputs before its first step, one file a kind of training."""
