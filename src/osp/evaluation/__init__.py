"""Videos -> numbers: reconstruction metrics, Frechet distances, contact sheets."""
