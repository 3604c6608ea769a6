"""What comes out: evaluation, metrics and plots of an ensemble."""
