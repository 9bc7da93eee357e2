"""Data sets by name: each turns a layout on disk (or a seed) into a manifest and reads its arrays."""
