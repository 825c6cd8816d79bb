"""Several processes on one pass over the pool: who does what, who is alive, and one process that commits."""
