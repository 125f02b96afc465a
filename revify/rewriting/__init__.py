"""Plan + model → converted model, and back. The only package that edits modules, and it edits copies."""
