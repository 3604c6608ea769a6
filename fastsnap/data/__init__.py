"""What goes in: data sets, read as untrusted input, the draws of every batch, and the pipelines."""
