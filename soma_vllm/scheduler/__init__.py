"""Dispatch: who answers a turn, and what happens afterwards. Start reading in dispatcher.py."""
