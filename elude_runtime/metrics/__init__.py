"""What an operator sees of a running server: metrics of its workers, their exporter, and the drift of features."""
