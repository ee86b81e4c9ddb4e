"""Everything that looks: at models on benchmarks, at runs."""
