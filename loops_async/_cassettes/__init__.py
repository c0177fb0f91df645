"""Recorded exchanges with a service: their file, the recorder and the player."""
