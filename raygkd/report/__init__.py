"""Output for people: progress on the terminal, tables, figures and report pages."""
