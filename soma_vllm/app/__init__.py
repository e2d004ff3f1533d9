"""soma-serve: put together, checked, started and stopped."""
