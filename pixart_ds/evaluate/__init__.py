"""Pictures from weights, wherever these lie."""
