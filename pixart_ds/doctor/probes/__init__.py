"""The probes by subject. Each looks at one thing and gives a verdict; what they judge by are pure functions beside them."""
