"""Latents and texts that were made once: what a folder of them holds, and how it is written."""
