"""What is particular to one task: data, features, post-processing and metrics."""
