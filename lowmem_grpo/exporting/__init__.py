"""A trained adapter merged into its base, checked, converted for llama.cpp, and uploaded."""
