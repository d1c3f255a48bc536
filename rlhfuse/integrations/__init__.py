"""Fused updates inside other frameworks' training processes."""
