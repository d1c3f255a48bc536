"""The commands, one file each. Each prints for people, or one JSON object with ``--json``."""
