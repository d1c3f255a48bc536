"""The two processes of a device: a rollout worker and a training worker."""
