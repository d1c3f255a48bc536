"""Training pipelines: executor, update, checkpoints, supervised preparation."""
