"""The mathematics of the search: numbers and functions, nothing that knows a network."""
