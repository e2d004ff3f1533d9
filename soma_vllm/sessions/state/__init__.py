"""Pure state: what a session is, how events move it, and what the gate concludes from numbers. No I/O here."""
