"""`elude report`: a checkpoint's features as static pages, which open from files in any browser."""
