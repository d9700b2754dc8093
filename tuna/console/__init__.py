"""What commands print: text that is safe on a terminal, progress, problems, notices, the next command."""
