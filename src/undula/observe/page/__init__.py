"""A page of text, tables and drawings, of parts that are free of HTML: one file, no script, nothing from elsewhere."""
