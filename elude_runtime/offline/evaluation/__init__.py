"""Evaluation: the same measures for a checkpoint's features and for the features that others would find there."""
