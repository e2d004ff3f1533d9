"""What an operator can see: metrics from the stream of events."""
