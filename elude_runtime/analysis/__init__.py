"""Attribution, steering and activations on a loaded model."""
