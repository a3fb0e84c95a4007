"""The products behind the ladder: the plain law (`reference`) and its faster equals.  Nothing but torch is used here."""
