"""Offline comparison of everything that could have served a dialogue, on turns that nothing was trained on."""
