"""`insitu compare`: two stretches of recorded time against each other."""
