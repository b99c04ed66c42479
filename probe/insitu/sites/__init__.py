"""What can be observed in a model, and where that lies."""
