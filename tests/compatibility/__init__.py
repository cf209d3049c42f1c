"""The package as a user gets it, in environments of its own: `python -m tests.compatibility`.

One wheel is built, from a source distribution of what git tracks, and tested where it was not
built: under other versions of torch and Triton, without a compiler, Triton or NumPy. The source
distribution is installed with and without a compiler, and under other versions of Python.
"""
