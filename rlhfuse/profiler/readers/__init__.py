"""Readers of traces, ours and other people's. Each turns files into timelines."""
