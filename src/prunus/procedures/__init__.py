"""Procedures: named methods that run whole trainings as stages; they stand above `run`, step methods in `methods`."""
