"""What everything in planning/ speaks of: tiers, exchanges, plans, models, machines, files."""
