"""Hugging Face models as pipeline stages: packed batches, stages, partition, weights in and out."""
