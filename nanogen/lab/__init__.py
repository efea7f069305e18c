"""The laboratory: one training loop, runs on disk, samples, judges, metrics and the report."""
