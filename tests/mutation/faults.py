"""All faults."""

from tests.mutation import cpu_faults, cuda_faults, python_faults, search_faults, triton_faults

FAULTS = (
    *cpu_faults.FAULTS,
    *cuda_faults.FAULTS,
    *triton_faults.FAULTS,
    *python_faults.FAULTS,
    *search_faults.FAULTS,
)
