"""One time for the rows of several hosts, and what speaks against it."""
