"""Load on a server: a generator that runs in a process of its own, and figures of what it saw. Needs httpx only."""
