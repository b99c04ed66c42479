"""One process's probe as its own code sees it, what it says of a step, and what it times."""
