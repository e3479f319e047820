"""Damaged and hostile files, made by a seed, and what the readers make of them."""
