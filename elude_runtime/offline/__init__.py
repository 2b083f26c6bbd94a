"""The long-running jobs: rewrite, verify, and the feature table."""
