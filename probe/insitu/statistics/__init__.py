"""What values at a site were like: measured inside a step, in parts that add up."""
