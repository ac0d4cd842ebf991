"""The check_training component."""
