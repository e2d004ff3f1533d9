"""Commands that study, replay and calibrate; no server imports them."""
