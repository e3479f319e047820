"""The memory, time and cost of a training run, found before anything is loaded."""
