"""The stages of benchmarks/gpu_first_hour.py: `stages` lists them, `runner` runs them, `report` writes their table."""
