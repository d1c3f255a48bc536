"""Elementwise policy, value and KL terms over tokens.

A thin name over the definitions for now: on a CPU they are already a handful of passes over T
numbers, next to nothing beside the head.
"""

from rlhfuse.kernels.reference import (
    PolicyTerms,
    ValueTerms,
    kl_terms,
    policy_terms,
    value_terms,
)

__all__ = ["PolicyTerms", "ValueTerms", "kl_terms", "policy_terms", "value_terms"]
