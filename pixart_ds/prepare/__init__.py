"""Pictures and captions on disk to a prepared set."""
