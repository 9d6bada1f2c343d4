"""Pictures from weights, and how they are shown."""
