"""Checks of what this code claims: its results against the recorded results of the published code."""
