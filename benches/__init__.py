"""Speed and memory of the op against its peers."""

import os

# How long an OpenMP thread waits in a loop before it sleeps; to be said before torch is there. Left
# alone it loops for milliseconds, and so holds the very core that the others need as soon as any
# program else wants one: measured on two cores beside one busy program, every call took 4 ms or a
# multiple of it. Sleeping at once costs 0.1 ms a call until the thread is awake. All peers alike.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
