"""The verbs of the command line.  Names become objects here and nowhere deeper."""
