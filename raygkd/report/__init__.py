"""What people read: progress on the terminal, tables and figures."""
