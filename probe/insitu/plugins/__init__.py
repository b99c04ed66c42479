"""What other packages add, and kits that try whether it does what it should (`docs/extending.md`)."""
