"""Who calls the collector, and what they may do."""
