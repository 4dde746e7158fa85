"""Where tensors come from: checkpoint folders and GGUF files."""
