"""Hugging Face models as pipeline stages."""
