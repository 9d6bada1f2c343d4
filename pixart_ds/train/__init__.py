"""Training of one stage by one rank among many."""
