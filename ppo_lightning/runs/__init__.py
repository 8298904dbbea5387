"""What a run is beside its algorithm: ranks, seeds, state for resuming."""
