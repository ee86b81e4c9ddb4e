"""Everything that only looks: benchmarks of models, reports on runs, and the plan of a run."""
