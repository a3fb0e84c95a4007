"""Many adapters behind one base: a pool of them, an engine that mixes them in one batch, and a server."""
