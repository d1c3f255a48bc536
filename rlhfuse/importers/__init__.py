"""Other frameworks' configurations become ours. Nothing is dropped silently."""
