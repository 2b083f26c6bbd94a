"""`elude demo`."""


def demo() -> None:
    """The whole main job on the embedded default."""
