"""A run replayed with a change, and what that predicts."""
