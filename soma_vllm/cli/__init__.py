"""Commands, and the composition root (server.py) that fits all rooms together."""
