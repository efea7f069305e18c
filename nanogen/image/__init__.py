"""The image track: one file a method, read from top to bottom."""
