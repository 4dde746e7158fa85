"""Low-rank adapters: PEFT folders and GGUF files as one checked table."""
