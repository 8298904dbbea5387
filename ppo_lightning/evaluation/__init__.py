"""Evaluations: exactly N episodes, on environments of their own."""
