"""Many trainings at once on one base in memory."""
