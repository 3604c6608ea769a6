"""Train a snapshot ensemble in one training run, and measure what it is worth.

The library is used through its modules; importing this package does nothing else:

    fastsnap.train          python -m fastsnap.train: one training run -> M snapshots
    fastsnap.ensemble_eval  python -m fastsnap.ensemble_eval: the table of the ensemble
    fastsnap.training.optim  SnapshotSGD, the fused update as a torch.optim.Optimizer
    fastsnap.kernels.schedule  the learning rate and the cycle as pure functions of the step
"""

__version__ = "0.1.0"
