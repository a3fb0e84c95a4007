"""What takes the steps of a training: optimisers, schedules, parameter groups."""
