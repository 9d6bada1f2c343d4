"""Weights under other projects' names and in their folders."""
