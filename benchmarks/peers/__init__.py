"""What is compared; each module is a program of its own, so that each peer runs alone in a fresh process."""
