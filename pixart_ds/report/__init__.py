"""What a run cost, for people: numbers, curves and pictures in one page."""
