"""The live model: layers as matrices, adapters attached to them, mixed batches, merges."""
