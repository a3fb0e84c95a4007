"""Several adapters as one: weighted sums and averages."""
