"""The merge_lora component."""
