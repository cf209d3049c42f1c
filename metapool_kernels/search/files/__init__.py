"""JSON and YAML, read strictly: what a parser would let through is refused."""
