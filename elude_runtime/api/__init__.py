"""The documents of the JSON API (`schema`, no torch) and the engine that answers a batch of them."""
