"""What observing costs a step, and the budget that it is held to."""
