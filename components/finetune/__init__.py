"""The finetune component."""
