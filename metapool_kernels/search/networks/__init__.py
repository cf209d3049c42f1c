"""Networks: taken from elsewhere, with enhancers, searched, derived, measured."""
