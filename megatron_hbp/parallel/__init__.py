"""Process groups of the plan: every CP group made at start-up."""
