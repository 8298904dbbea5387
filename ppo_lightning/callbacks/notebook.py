"""What a run is doing, in a notebook."""

from lightning import Callback


class NotebookDisplay(Callback):
    """."""
