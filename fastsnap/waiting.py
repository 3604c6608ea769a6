"""How long the threads of a program spin before they sleep, told to GNU's OpenMP before PyTorch loads it.

By default a thread that waits for work spins for milliseconds, on a core that another program may need: two runs of
the digits at once make 40 to 65 images/s each, where one alone makes 5,600. With this many rounds, some tens of
microseconds, they make 780 each, and one alone is as fast as before (two cores of a Xeon; with fewer rounds, 3,000, the
pair makes 1,670 each, but one alone loses a fifth).
"""

import os

ROUNDS = "10000"


def spin_shortly() -> None:
    """For the process of a command line, before it imports torch. What the user has set counts."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", ROUNDS)
