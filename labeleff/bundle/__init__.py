"""Rounds of questions on their way to a person and back: a folder of NIfTI files, and what is checked on return."""
