"""How much is taken, of whom, and when a stream is ended."""
