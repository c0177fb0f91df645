"""The parts of training that are not operations: custom losses, logging of steps."""
