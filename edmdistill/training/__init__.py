"""The training loop, which knows no method by name, and what a run leaves in its directory."""
