"""Clips in tar files: cutting, writing, listing."""
