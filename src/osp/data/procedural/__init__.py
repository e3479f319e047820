"""Clips drawn by program, and the oracle that reads their truth back from pixels."""
