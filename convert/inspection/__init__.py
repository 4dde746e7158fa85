"""A look into GGUF files: what they are, what they lack, what sets two apart, what fits onto a device."""
