"""The output folder of a run: what it holds, how that is written, and who may write there."""
