"""Dialogue sessions: what one is (`state`), which are live (`registry`), and where they are kept (`sql`)."""
