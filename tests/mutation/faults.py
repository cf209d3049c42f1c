"""All faults."""

from tests.mutation import cpu_faults, gpu_faults, python_faults, search_faults

FAULTS = (
    *cpu_faults.FAULTS,
    *gpu_faults.FAULTS,
    *python_faults.FAULTS,
    *search_faults.FAULTS,
)
