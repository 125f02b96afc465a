"""What a training step costs, as a report."""
