"""The session store's tables as steps, each in `versions/`. A new step is written by hand beside its change to
`tables.py`; the tests say what is missing between the two. A step that was released is never edited."""
