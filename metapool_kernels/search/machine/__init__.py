"""What a run meets around it: processes, Ctrl-C, kernels to compile, a terminal."""
