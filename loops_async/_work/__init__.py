"""What is under way in a session: the one registry that everything reads which shows or counts work."""
