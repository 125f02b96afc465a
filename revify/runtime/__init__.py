"""What runs in place of a block. Knows neither graphs nor plans."""
