"""What this code claims, checked: recorded numbers of the published code."""
