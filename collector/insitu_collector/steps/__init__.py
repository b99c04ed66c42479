"""What steps take on each rank, what they take on a healthy one, and who waits for whom."""
