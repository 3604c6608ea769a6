"""What the benchmarks measure with and report with; it imports neither benchmarks nor opponents."""
