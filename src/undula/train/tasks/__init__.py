"""Tasks: how rows become examples, which head the model gets, what is measured, how rows are answered."""
