"""Speed and memory of the op against its peers."""

import os

# OpenMP threads that wait in a loop hold the very core that the others need as soon as anybody
# else wants one: measured on two cores beside one busy program, every call took 8 ms or a multiple
# of it. Sleeping costs microseconds, and all peers alike. It has to be said before torch is there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
