"""Losses, advantages and what multiplies them."""
