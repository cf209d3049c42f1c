"""What a run has found, in figures, words and on a page."""
