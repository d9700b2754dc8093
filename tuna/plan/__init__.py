"""Planner: memory and time of a training step, and the GPUs it fits on, by simulation."""
