"""A file for each runtime."""
