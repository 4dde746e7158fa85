"""What every call of a model uses: its options, the call itself, a pool of sessions, and the engine around them."""
