"""The products behind the ladder: the plain law (`reference`) and its faster equals.  Only torch is used here."""
