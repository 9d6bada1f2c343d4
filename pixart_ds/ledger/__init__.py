"""What was consumed: entries, the book of a run, accounting, and the report."""
