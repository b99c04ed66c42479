"""A store's files: written, read while they are, made whole again, taken out by age and size."""
