"""What flight recorders shipped: one rank's incident made every rank's, and told."""
