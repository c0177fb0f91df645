"""The peers that are compared. Each module is a program, so that each peer runs alone in a fresh process."""
