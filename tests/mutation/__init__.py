"""Do the tests notice? `python -m tests.mutation` plants faults, one at a time, and runs them."""
