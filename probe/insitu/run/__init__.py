"""`insitu run`: a model is found and attached to in a program that stays as it is."""
