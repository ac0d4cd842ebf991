"""The plan_data component."""
