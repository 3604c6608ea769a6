"""How a network is trained: flat storage, optimiser, step, trainer, progress, stopping."""
