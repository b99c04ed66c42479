"""Keeping a store: what is in it, small segments merged, what is to go and what is to be erased; `insitu store`."""
