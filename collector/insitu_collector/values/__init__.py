"""What values at sites were like, from what steps and ranks stored of them."""
