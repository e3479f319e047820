"""What stands in the folder of configurations: groups, meanings, and who reads what; plain values, without Hydra."""
