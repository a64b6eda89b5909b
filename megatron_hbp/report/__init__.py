"""Plans and runs as tables, pictures and pages."""
