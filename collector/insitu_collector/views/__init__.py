"""What people look at: `insitu stalls`, a notebook, charts."""
