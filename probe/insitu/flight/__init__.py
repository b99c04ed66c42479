"""The flight recorder: what is held, what makes it ship that, and what is shipped."""
