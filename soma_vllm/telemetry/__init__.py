"""Prometheus metrics, from the stream of events."""
