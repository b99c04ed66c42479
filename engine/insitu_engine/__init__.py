"""The inference engine: a driver and one process a rank, observed through the probe like any other model."""
