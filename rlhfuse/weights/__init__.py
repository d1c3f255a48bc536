"""Weights from the training pipelines to engines and scorers."""
