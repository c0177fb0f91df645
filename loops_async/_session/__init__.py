"""What all clients of one service share, and how runs and samplers are provisioned."""
