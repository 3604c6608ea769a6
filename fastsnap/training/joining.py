"""Whether this process is one of many that torchrun started."""

import os

from fastsnap.training.ranks import Ranks


def join_ranks() -> Ranks:
    """This process's place among those that torchrun started; alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return Ranks()
    from fastsnap.training.process_group import ProcessGroup  # not needed by a process on its own

    return ProcessGroup()
