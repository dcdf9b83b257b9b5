"""One step's rollout: prompts drawn, completions sampled, scored and compared."""
