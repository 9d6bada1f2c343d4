"""One allocation: the supervisor that starts the ranks, and its launchers."""
