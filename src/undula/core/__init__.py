"""Values: choices and their codec, the ladder of methods, the adapter.  Imports torch alone."""

VERSION = "0.1.0"
