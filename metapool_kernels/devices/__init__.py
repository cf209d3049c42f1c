"""Networks on the runtimes of devices: converting, loading, comparing, timing."""
