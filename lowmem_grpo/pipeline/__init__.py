"""The work around trainings: completions sampled into a file, and rows chosen from it to train on."""
