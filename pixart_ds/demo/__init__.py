"""The demo: a drawn world, a judge who reads pictures of it, toy encoders, and the run of everything."""
