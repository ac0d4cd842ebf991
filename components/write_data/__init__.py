"""The write_data component."""
