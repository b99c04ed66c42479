"""A store's records on their way to a collector, each batch once."""
