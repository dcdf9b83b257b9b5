"""The doctor of a run, who says once what keeps it from learning: what findings are, and what steps show."""
