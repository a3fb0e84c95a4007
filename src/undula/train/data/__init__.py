"""Rows: files read, checked and split, columns, faults; texts, conversations, images, sounds."""
