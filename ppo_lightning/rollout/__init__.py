"""Rollouts: environments stepped with the present policy."""
