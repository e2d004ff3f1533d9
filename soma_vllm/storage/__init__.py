"""Sessions and their events in SQL."""
