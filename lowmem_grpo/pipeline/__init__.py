"""Several runs as one, in phases; and the work around trainings: sampling into a file, choosing rows of it."""
