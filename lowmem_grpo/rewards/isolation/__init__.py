"""Foreign code kept apart: time limits, worker processes, and a jail for what a model wrote."""
