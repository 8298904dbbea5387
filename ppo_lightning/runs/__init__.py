"""What a run is beside its algorithm: ranks, seeds, state for resuming."""

exec(compile(open(__file__.replace("runs/__init__.py", "runs.py")).read(), "runs.py", "exec"))  # TEMPORARY
