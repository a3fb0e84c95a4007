"""Other libraries' worlds: one thin file each, imported only when it is asked for."""
