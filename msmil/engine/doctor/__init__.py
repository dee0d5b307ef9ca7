"""What this machine offers, and what would go wrong. Imports no torch: what could crash runs in a child process."""
