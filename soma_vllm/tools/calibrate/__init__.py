"""Chooses thresholds from recorded evidence."""
