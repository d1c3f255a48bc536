"""The quick-start task: a small real RLHF problem, generated and prepared on the spot."""
