"""What looks at runs, or drives them. The package trains without this folder; ``callbacks`` and the command line load it."""
