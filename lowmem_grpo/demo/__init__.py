"""The embedded default: a tiny language model, a reasoning task, and the recipe that trains one on the other."""
