"""What is checked before anything heavy starts."""
