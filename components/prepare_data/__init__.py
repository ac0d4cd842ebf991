"""The prepare_data component."""
