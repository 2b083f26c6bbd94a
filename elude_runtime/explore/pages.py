"""The pages that the explorer serves: the report's, and its own page in the same frame."""
