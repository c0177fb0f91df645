"""State shared by all clients of one service, and provisioning of runs and samplers."""
