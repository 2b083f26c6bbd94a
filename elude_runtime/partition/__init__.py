"""Pure tensor mathematics: contributions -> clusters -> partition -> concepts; no files, no models, no schema."""

from elude_runtime.partition.partition import MAX_SUBUNITS, REST_CONCEPT, REST_EDGE, Partition
from elude_runtime.partition.sign_split import SplitConfig

__all__ = ["MAX_SUBUNITS", "REST_CONCEPT", "REST_EDGE", "Partition", "SplitConfig"]
