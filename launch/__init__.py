"""What a person starts; thin: parse, call, exit code."""
