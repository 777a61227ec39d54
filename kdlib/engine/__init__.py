"""Training: what a run's numbers are made of."""
