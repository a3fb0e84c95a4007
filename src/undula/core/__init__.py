"""Values: choices and their codec, the ladder of methods, the adapter.  Imports torch alone."""
