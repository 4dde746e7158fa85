"""The binding to the C library: the only folder that touches it."""
