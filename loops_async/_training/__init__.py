"""The parts of training that are not operations: custom losses, what is told of each step."""
