"""What a run will need, predicted from a model's configuration alone."""
