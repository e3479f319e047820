"""Questions to a new machine before a week of training: versions, devices, kernels, exchange, speed, a real step."""
