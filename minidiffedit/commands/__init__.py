"""The commands, a file per group: each has `add(commands)`, and imports what is heavy only when it runs."""
