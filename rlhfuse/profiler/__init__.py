"""Where the time of a step went, by cause; readers of foreign traces; what-if replays."""
