"""The data preview: the first row as the model gets it, one file a kind of training."""
