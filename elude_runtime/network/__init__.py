"""What is done to a timm model: building it, finding split layers, tails, edits, the explicit form."""
