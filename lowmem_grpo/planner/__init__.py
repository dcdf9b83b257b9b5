"""The needs of a run, predicted from a model's configuration alone."""
