"""Programs that a probe starts because they may hang, or need a process of their own: a driver, torch, ranks that reduce."""
