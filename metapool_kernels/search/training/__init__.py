"""Steps and epochs: the search itself, and the plain training of what it has found."""
