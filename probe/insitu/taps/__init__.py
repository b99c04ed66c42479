"""What runs inside a forward pass, eager and compiled, and what attaching does to a model."""
