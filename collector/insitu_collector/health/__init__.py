"""What the collector says of itself: whether it can store, what it took, refused and lost."""
