"""Datasets to tokenized prompts."""
