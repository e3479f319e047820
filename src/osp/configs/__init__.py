"""The contents of the folder of configurations as plain values, without Hydra: groups, meanings, and who reads what."""
