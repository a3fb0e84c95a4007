"""Looking at a live model: running batches, listening at adapted layers, probes, diagnoses and their figures."""
