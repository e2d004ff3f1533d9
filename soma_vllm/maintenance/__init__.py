"""What is done outside any request: recovery, retention, eviction, administration."""
