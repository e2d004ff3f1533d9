"""Plays recorded dialogues against a server and shows who answered which turn."""
