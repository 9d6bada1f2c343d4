"""`pixart-ds doctor`: whether this machine, and what a stage needs beyond it, can train; on a login node and inside a job."""
