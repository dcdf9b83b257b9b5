"""The training loops, each one function from top to bottom."""
