"""Settings: every field of a run, its checks, and what TRL's users should know. Standard library only."""
