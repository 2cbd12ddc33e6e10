"""The commands, a file per group: COMMANDS names them, and what is heavy is imported only when one runs."""
