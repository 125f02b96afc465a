"""What a model's code does, as records: graphs, calls, residual additions. Reads copies, decides nothing."""
