"""Images → fitted predictors."""
