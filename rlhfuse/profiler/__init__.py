"""Where the time went: attribution, readers, what-if."""
