"""What is done for a session in the background: judged, trained, switched, audited."""
