"""The folder of a run, what stands in it, and the networks that it is about."""
