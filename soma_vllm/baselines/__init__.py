"""Third-party methods to compare with, each in a process of its own."""
