"""Studies: which adapter is best for a model and a budget, compared honestly."""
