"""What developers run; not installed."""
